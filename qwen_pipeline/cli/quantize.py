"""``qwen-pipeline quantize``, ``allocate`` and ``export``: weights to codes, their bits, and their format."""

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
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.allocation.goals import Goal, Measure
from qwen_pipeline.quantization.spec import QuantSpec, default_device, parse_overrides
from qwen_pipeline.qwen.precision import parse_words

app = typer.Typer()

QUANTIZATION_OPTIONS = SpecOptions(
    QuantSpec,
    {
        "method": "Integer codes by GPTQ, or 8-bit floats, which need no calibration: in blocks as Qwen releases them"
        " (fp8), or as compressed-tensors, in blocks or with a scale for each output (fp8-dynamic).",
        "bits": "Bits per weight, for GPTQ.",
        "recipe": "GPTQ alone, or with further steps that lose less at the same size and take longer.",
        "group_size": GROUP_SIZE_HELP,
        "precision": "Uniform, or what Qwen itself leaves out of its releases of the family.",
        "modules": FieldOption(
            flag="--module",
            parse=parse_words,
            help="REGEX=keep, 8 or 4g32 for modules in whose names REGEX is found; the first match counts; repeatable.",
        ),
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
        r"qwen-pipeline quantize --in padded/ --out mixed/ --calibration calibration/ --module 'self_attn\.=8'",
        "qwen-pipeline quantize --in padded/ --out quantized/ --method fp8",
    ],
)
def quantize(
    source: Source,
    out: Out,
    spec: Annotated[QuantSpec, QUANTIZATION_OPTIONS],
    calibration: Annotated[
        str | None,
        typer.Option(help=f"For GPTQ: directory that calibrate wrote, or calibration text: {TEXT_FORMATS}."),
    ] = None,
    max_skipped: MaxSkipped = None,
    template_argument: TemplateArgument = None,
    engine_python: EnginePython = None,
) -> CommandResult:
    """Quantize a checkpoint with GPTQ, in a separate process, or to 8-bit floats. Pad it first.

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


@command(
    app,
    "allocate",
    examples=[
        "qwen-pipeline allocate --in padded/ --candidate int4/ --candidate int8/ --text held_out.jsonl --gb 21"
        " --out allocation/",
    ],
)
def allocate(
    source: Source,
    candidate: Annotated[list[Path], typer.Option(help="Directory that quantize wrote from it; repeatable.")],
    text: Annotated[Path, typer.Option(help=f"Held-out text: {TEXT_FORMATS}.")],
    out: Annotated[Path, typer.Option(help="Directory for modules.toml, allocation.json and curve.png.")],
    gb: Annotated[float | None, typer.Option(help="Largest size of all tensors, in GB.")] = None,
    bits: Annotated[float | None, typer.Option(help="Largest average bits of the linear layers.")] = None,
    kl: Annotated[float | None, typer.Option(help="Largest divergence, in nats per token.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of text.")] = 2,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 128,
) -> CommandResult:
    """Choose a precision for each module: the least divergence for a size, or the least size for a divergence.

    The divergence of each part is measured with the candidates' codes, then that of the choice as a whole. Give one of
    --gb, --bits and --kl. modules.toml is for qwen_pipeline.toml.
    """
    from qwen_pipeline.cli.progress_bars import progress_bars
    from qwen_pipeline.cli.tables import allocation_view
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.stages.allocate import AllocationInputs, allocate

    inputs = AllocationInputs(
        source=source,
        candidates=tuple(candidate),
        text=text,
        goal=_goal(gb, bits, kl),
        windows=windows,
        seq_len=seq_len,
        device=default_device(),
        text_spec=load_settings().calibration.text_spec,
    )
    with progress_bars() as observe:
        data = allocate(inputs, out, observe=observe)
    return CommandResult(data=data, view=allocation_view(data, out))


def _goal(gb: float | None, bits: float | None, kl: float | None) -> Goal:
    given: dict[Measure, float | None] = {"bytes": gb * 1e9 if gb is not None else None, "bits": bits, "kl": kl}
    goals = [Goal(measure=measure, value=value) for measure, value in given.items() if value is not None]
    if len(goals) != 1:
        raise InputRefused(
            f"{len(goals)} goals are given, expected one of --gb, --bits and --kl.",
            remedy="Give a size in GB, average bits, or a divergence, such as --bits 4.6.",
        )
    return goals[0]
