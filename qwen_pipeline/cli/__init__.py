"""``qwen-pipeline``: the stages, store and asset graph of Dagster, from a terminal.

Commands import heavy libraries only when they run, so that ``--help`` stays fast.
"""

from typing import Annotated

import typer

import qwen_pipeline
from qwen_pipeline.cli import (
    convert,
    engine,
    evidence,
    inspect,
    pipeline,
    plan,
    quantize,
    repair,
    stages,
    validate,
)
from qwen_pipeline.cli.lineage import audit, release
from qwen_pipeline.cli.operations import doctor, metrics, notify, releases, retention
from qwen_pipeline.workers.fast_exit import fast_exit

app = typer.Typer(
    name="qwen-pipeline",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 success, 1 a check failed, 2 the input or the usage was refused and nothing was written, "
    "3 environment error, 130 interrupted, 70 error in this program.",
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(qwen_pipeline.__version__)
        raise typer.Exit


@app.callback()
def about(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Turn a fine-tune of a Qwen model into a quantized checkpoint that is proven to serve correctly.

    base + fine-tune -> merged -> padded -> quantized -> validated -> published

    Settings come from qwen_pipeline.toml in the working directory, or from the file that QWEN_PIPELINE_CONFIG names.
    """


app.add_typer(pipeline.app)
app.add_typer(convert.app)
app.add_typer(stages.app)
app.add_typer(quantize.app)
app.add_typer(validate.app)
app.add_typer(plan.app)
app.add_typer(inspect.app)
app.add_typer(repair.app)
app.add_typer(evidence.app)
app.add_typer(audit.app, name="audit")
app.add_typer(release.app)
app.add_typer(doctor.app)
app.add_typer(notify.app)
app.add_typer(metrics.app)
app.add_typer(releases.app)
app.add_typer(retention.app)
app.add_typer(engine.app, name="engine")


def main() -> None:
    with fast_exit():
        app()
