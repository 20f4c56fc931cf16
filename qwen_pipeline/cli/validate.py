"""``qwen-pipeline validate`` and ``compare``: measure a quantized checkpoint, and compare two measurements."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from qwen_pipeline.cli.options import ENGINE_HELP, EnginePython, MaxSkipped, TemplateArgument, text_spec
from qwen_pipeline.cli.results import CommandResult, command
from qwen_pipeline.cli.stages import run_stage
from qwen_pipeline.quantization.spec import QuantizerName, QuantSpec

app = typer.Typer()

ServingChoice = Literal["vllm", "vllm-cpu"]
_DEFAULTS = QuantSpec()


@command(
    app,
    "validate",
    examples=[
        "qwen-pipeline validate --reference merged/ --padded padded/ --candidate quantized/ --text held-out.txt --tp 8"
    ],
)
def validate(
    reference: Annotated[Path, typer.Option(help="Merged, full-precision checkpoint.")],
    candidate: Annotated[Path, typer.Option(help="Quantized checkpoint.")],
    text: Annotated[Path, typer.Option(help="Text not used for calibration: .txt, or others as for quantize.")],
    out: Annotated[Path | None, typer.Option(help="Directory of the report; default: <candidate>-validation.")] = None,
    tp: Annotated[int, typer.Option(help="Tensor-parallel degree that the checkpoint must serve at.")] = 1,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Engine and ranks that it must serve on, such as vllm-marlin:8; repeatable."),
    ] = None,
    base: Annotated[Path | None, typer.Option(help="Base checkpoint, to compare perplexities with.")] = None,
    padded: Annotated[Path | None, typer.Option(help="Padded checkpoint that the candidate was made from.")] = None,
    unpadded: Annotated[Path | None, typer.Option(help="Reference quantized without padding, as a baseline.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Output of calibrate, to measure activations on.")] = None,
    before: Annotated[Path | None, typer.Option(help="Previous quantized version, to compare losses with.")] = None,
    engine: Annotated[QuantizerName, typer.Option(help=ENGINE_HELP)] = _DEFAULTS.engine,
    engine_python: EnginePython = None,
    fine_tune: Annotated[str | None, typer.Option(help="Fine-tune whose limits in validation.overrides apply.")] = None,
    max_skipped: MaxSkipped = None,
    template_argument: TemplateArgument = None,
    serve: Annotated[ServingChoice | None, typer.Option(help="Also serve with this engine, and query it.")] = None,
    serve_tp: Annotated[list[int] | None, typer.Option(help="Degree to serve at; repeatable. Default: --tp.")] = None,
) -> CommandResult:
    """Compare a quantized checkpoint with the one it was made from, and write a report.

    Limits, prompts, the amount of text, serving and (unless given here) targets come from the section validation of
    qwen_pipeline.toml.
    """
    from dataclasses import replace

    from qwen_pipeline.config import load_settings
    from qwen_pipeline.evaluation.tensor_parallel.findings import Target
    from qwen_pipeline.stages import validate as stage
    from qwen_pipeline.workers.environments import find_environment

    configured = load_settings()
    settings = configured.validation
    serving = configured.serving_plan(serve, tuple(serve_tp or ()) or settings.serve.tensor_parallel or (tp,))
    inputs = stage.ValidationInputs(
        reference=reference,
        candidate=candidate,
        text=text,
        base=base,
        padded=padded,
        unpadded=unpadded,
        calibration=calibration,
        before=before,
    )
    configured_plan = configured.validation_plan(fine_tune, serving=serving)
    plan = replace(
        configured_plan,
        text_spec=text_spec(configured_plan.text_spec, max_skipped, template_argument),
        tensor_parallel=tp,
        targets=[Target.parse(text) for text in target or ()] or settings.declared,
    )
    return run_stage(
        lambda observe: stage.validate(
            inputs,
            plan=plan,
            destination=out or candidate.resolve().with_name(f"{candidate.resolve().name}-validation"),
            engine=find_environment(QuantSpec(engine=engine).environment, engine_python),
            observe=observe,
        )
    )


@command(app, "compare", examples=["qwen-pipeline compare released/ validated/"])
def compare(before: Path, now: Path) -> CommandResult:
    """Show how the quantized model changed from one release or validation (BEFORE) to a later one (NOW)."""
    from dataclasses import asdict

    from qwen_pipeline.cli.tables import change_table
    from qwen_pipeline.evaluation.regression import changes, load_verdict
    from qwen_pipeline.evaluation.regression import compare as compare_verdicts

    old, new = load_verdict(before), load_verdict(now)
    report, found = compare_verdicts(old, new), changes(old, new)
    data = {"changes": [asdict(change) for change in found], "report": asdict(report)}
    return CommandResult(data=data, view=[change_table(found), report.detail])
