"""``qwen-pipeline repair``: make a checkpoint quantized without padding serve on more ranks."""

from pathlib import Path
from typing import Annotated

import typer

from qwen_pipeline.cli.options import RANKS_HELP, TOWERS_HELP
from qwen_pipeline.cli.results import CommandResult, command
from qwen_pipeline.cli.stages import run_stage
from qwen_pipeline.qwen.padding_spec import PaddingSpec

app = typer.Typer()


@command(
    app,
    "repair",
    examples=[
        "qwen-pipeline repair Qwen2.5-72B-GPTQ-Int4/ --tp 8",
        "qwen-pipeline repair Qwen2.5-72B-GPTQ-Int4/ --tp 8 --out repaired/",
    ],
)
def repair(
    checkpoint: Path,
    tp: Annotated[int, typer.Option(help=RANKS_HELP)] = PaddingSpec().tensor_parallel,
    towers: Annotated[bool, typer.Option("--towers", help=TOWERS_HELP)] = False,
    out: Annotated[
        Path | None, typer.Option(help="New or empty directory. Without it, only show what the repair would change.")
    ] = None,
) -> CommandResult:
    """Make a quantized CHECKPOINT serve on more ranks, by adding whole groups of zero codes to its MLPs.

    Nothing is quantized again. Supported are GPTQ (4 and 8 bits, also asymmetric and with act-order), AWQ (gemm) and
    compressed-tensors (pack-quantized). Every live weight is proven to keep its bits in the ranks' shards. A checkpoint
    that cannot be repaired with groups is refused, and the message names an alternative.
    """
    from qwen_pipeline.checkpoint.store.destinations import Directory
    from qwen_pipeline.cli.tables import repair_table
    from qwen_pipeline.qwen.geometry import dump_plan
    from qwen_pipeline.stages import repair as stage

    plan = stage.plan(checkpoint, tensor_parallel=tp, towers=towers)
    data = {"changes": plan.changes, "padding": dump_plan(plan)}
    table = repair_table(plan)
    if not plan.changes:
        return CommandResult(data=data, view=[table, f"It already serves on {tp} ranks; there is nothing to repair."])
    if out is None:
        return CommandResult(
            data=data, view=[table, "Nothing was written. Pass --out to write the repaired checkpoint."]
        )
    repaired = run_stage(
        lambda observe: stage.repair(
            source=checkpoint, destination=Directory(out), tensor_parallel=tp, towers=towers, observe=observe
        )
    )
    return CommandResult(data={**data, **repaired.data}, view=[table, *repaired.view], fault=repaired.fault)
