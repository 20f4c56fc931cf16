"""``qwen-pipeline repair``: for whoever quantized first and now cannot serve."""

from pathlib import Path
from typing import Annotated

import typer

from qwen_pipeline.cli.results import CommandResult, command
from qwen_pipeline.cli.stages import Towers, made_by

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
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks, each of which must get whole groups.")] = 8,
    towers: Towers = False,
    out: Annotated[
        Path | None, typer.Option(help="New or empty directory. Without it, only say what it takes.")
    ] = None,
) -> CommandResult:
    """Make a quantized CHECKPOINT serve more ranks: add whole groups of zero codes to its MLPs. Nothing is requantized.

    GPTQ (4 and 8 bit, also asymmetric and with act-order), AWQ (gemm) and compressed-tensors (pack-quantized). Every
    live weight is proven to keep its bits, as the ranks will hold it. Where groups cannot help, it says what does.
    """
    from qwen_pipeline.checkpoint.store.destinations import Directory
    from qwen_pipeline.cli.tables import repair_table
    from qwen_pipeline.qwen.geometry import dump_plan
    from qwen_pipeline.stages import repair as stage

    plan = stage.plan(checkpoint, tensor_parallel=tp, towers=towers)
    data = {"changes": plan.changes, "padding": dump_plan(plan)}
    table = repair_table(plan)
    if not plan.changes:
        return CommandResult(data=data, view=[table, f"It serves {tp} ranks as it is: there is nothing to repair."])
    if out is None:
        return CommandResult(data=data, view=[table, "Nothing was written: name a directory with --out."])
    made = made_by(
        lambda observe: stage.repair(
            source=checkpoint, destination=Directory(out), tensor_parallel=tp, towers=towers, observe=observe
        )
    )
    return CommandResult(data={**data, **made.data}, view=[table, *made.view], fault=made.fault)
