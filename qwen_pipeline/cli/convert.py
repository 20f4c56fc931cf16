"""``qwen-pipeline convert``: from a trainer's checkpoint to safetensors."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from qwen_pipeline.cli.options import Out
from qwen_pipeline.cli.results import CommandResult, command
from qwen_pipeline.cli.stages import run_stage

app = typer.Typer()

DtypeChoice = Literal["bfloat16", "float16", "float32"]


@command(
    app,
    "convert",
    examples=[
        "qwen-pipeline convert --from checkpoint-500/ --out my-lora/",
        "qwen-pipeline convert --from checkpoint-500/global_step500/ --base base/ --dtype bfloat16 --out my-model/",
    ],
)
def convert(
    source: Annotated[Path, typer.Option("--from", help="Checkpoint of a trainer: a file or a directory.")],
    out: Out,
    base: Annotated[
        Path | None, typer.Option(help="Base model, for config, tokenizer and names that the checkpoint lacks.")
    ] = None,
    dtype: Annotated[
        DtypeChoice | None, typer.Option(help="Round weights to it. ZeRO's weights are float32 by default.")
    ] = None,
) -> CommandResult:
    """Convert a trainer's checkpoint to safetensors, for the inbox or merge: PyTorch pickles, DeepSpeed ZeRO, FSDP.

    Pickles are read as data: nothing in them is run, and a file that names anything but tensors is refused.
    """
    from qwen_pipeline.checkpoint.store.destinations import Directory
    from qwen_pipeline.stages import convert as stage

    return run_stage(
        lambda observe: stage.convert(
            source=source, destination=Directory(out), base=base, dtype=dtype, observe=observe
        )
    )
