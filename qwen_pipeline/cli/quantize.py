"""``qwen-pipeline quantize`` and ``export``: full-precision weights to codes, and codes to another format."""

from pathlib import Path
from typing import Annotated

import typer

from qwen_pipeline.cli.options import (
    ENGINE_HELP,
    GROUP_SIZE_HELP,
    TEXT_FORMATS,
    EnginePython,
    FieldOption,
    MaxSkipped,
    Out,
    Source,
    SpecOptions,
    TemplateArgument,
    text_spec,
)
from qwen_pipeline.cli.results import CommandResult, command
from qwen_pipeline.cli.stages import ALL_EXPERTS_HELP, CALIBRATION_HELP, run_stage
from qwen_pipeline.quantization.spec import QuantSpec, parse_overrides

app = typer.Typer()

QUANTIZATION_OPTIONS = SpecOptions(
    QuantSpec,
    {
        "bits": "Bits per weight.",
        "recipe": "GPTQ alone, or with further steps that lose less at the same size and take longer.",
        "group_size": GROUP_SIZE_HELP,
        "sym": "Grid that is symmetric about zero.",
        "desc_act": "Quantize columns by descending activation; slower to serve.",
        "act_group_aware": "Quantize groups by descending activation; no cost in serving.",
        "damp_percent": "Fraction of the mean Hessian diagonal that is added to the diagonal.",
        "mse": "Exponent of a search for scales, such as 2.4; 0: no search.",
        "dynamic": FieldOption(
            flag="--override",
            parse=parse_overrides,
            help="REGEX:damp_percent=0.1 (or mse) for modules in whose names REGEX is found; repeatable.",
        ),
        "engine": ENGINE_HELP,
        **CALIBRATION_HELP,
        "all_experts": ALL_EXPERTS_HELP,
        "batch_size": "Windows per forward pass; affects the bytes of the result.",
        "threads": "Threads of one CPU operation; default: all cores.",
        "device": "Default: a GPU if the machine has one.",
        "gpus": "GPUs for GPTQModel's own loop; affects the bytes of the result.",
    },
)


@command(
    app,
    "quantize",
    examples=[
        "qwen-pipeline quantize --in padded/ --out quantized/ --calibration chats.jsonl --bits 4",
        "qwen-pipeline quantize --in padded/ --out quantized/ --calibration calibration/ --bits 4",
    ],
)
def quantize(
    source: Source,
    out: Out,
    calibration: Annotated[
        str, typer.Option(help=f"Directory that calibrate wrote, or calibration text: {TEXT_FORMATS}.")
    ],
    spec: Annotated[QuantSpec, QUANTIZATION_OPTIONS],
    max_skipped: MaxSkipped = None,
    template_argument: TemplateArgument = None,
    engine_python: EnginePython = None,
) -> CommandResult:
    """Quantize a checkpoint with GPTQ, in a separate process. Pad it first.

    The same input, settings and versions give the same bytes. A module that could only be rounded fails a check.
    """
    from qwen_pipeline.checkpoint.store.destinations import Directory
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.stages import quantize as stage
    from qwen_pipeline.workers.environments import find_environment

    return run_stage(
        lambda observe: stage.quantize(
            source=source,
            destination=Directory(out),
            calibration=calibration,
            spec=spec,
            text_spec=text_spec(load_settings().calibration.text_spec, max_skipped, template_argument),
            engine=find_environment(spec.environment, engine_python),
            observe=observe,
        )
    )


@command(app, "export", examples=["qwen-pipeline export --in quantized/ --out for-vllm/"])
def export(
    source: Annotated[Path, typer.Option("--in", help="Directory that quantize wrote.")], out: Out
) -> CommandResult:
    """Write the same codes as compressed-tensors (pack-quantized), vLLM's own format, without quantizing again."""
    from qwen_pipeline.checkpoint.store.destinations import Directory
    from qwen_pipeline.stages import export as stage

    return run_stage(lambda observe: stage.export(source=source, destination=Directory(out), observe=observe))
