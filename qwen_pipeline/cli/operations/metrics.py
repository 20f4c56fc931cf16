"""``qwen-pipeline metrics``: figures for Prometheus."""

from pathlib import Path
from typing import Annotated

import typer

from qwen_pipeline.cli.results import CommandResult, command

app = typer.Typer()


@command(app, "metrics", examples=["qwen-pipeline metrics --textfile /var/lib/node_exporter/qwen_pipeline.prom"])
def metrics(
    textfile: Annotated[Path, typer.Option(help="File to write, which node_exporter's textfile collector reads.")],
) -> CommandResult:
    """Write products by state, seconds and bytes of stages, and free disk space in Prometheus' text format.

    The file is replaced at once, so that a collector never reads a part of it. Run it regularly, as from cron.
    """
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.errors import EnvironmentFault
    from qwen_pipeline.metrics import gather_metrics, prometheus_text

    found = gather_metrics(load_settings())
    unfinished = textfile.with_name(f".{textfile.name}.tmp")
    try:
        unfinished.write_text(prometheus_text(found))
        unfinished.replace(textfile)
    except OSError as error:
        raise EnvironmentFault(
            f"{textfile} cannot be written: {error.strerror}.", remedy="Choose a directory that exists and is yours."
        ) from error
    samples = sum(len(metric.samples) for metric in found)
    return CommandResult(data={"textfile": str(textfile), "samples": samples}, view=[f"{samples} samples: {textfile}"])
