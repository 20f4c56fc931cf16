"""The validation report as Markdown: the verdict, then the evidence."""

import base64
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from qwen_pipeline.checkpoint.manifest import find_manifest
from qwen_pipeline.evaluation.behaviour.checks import COLUMNS as BEHAVIOUR_COLUMNS
from qwen_pipeline.evaluation.behaviour.checks import behaviour_rows
from qwen_pipeline.evaluation.checks import verdict
from qwen_pipeline.evaluation.figures import HeadFigures, ModelFigures
from qwen_pipeline.evaluation.findings import MERGED_OTHERWISE, Findings, origin_of
from qwen_pipeline.evaluation.head_checks import purpose
from qwen_pipeline.evaluation.limits import DEFAULT_LIMITS, Limits
from qwen_pipeline.evaluation.measurement import Measurement
from qwen_pipeline.evaluation.origin import reading_of_base
from qwen_pipeline.evaluation.plan import ValidationInputs
from qwen_pipeline.evaluation.report import markup
from qwen_pipeline.evaluation.samples import Completion, Sample
from qwen_pipeline.evaluation.tensor_parallel.findings import COLUMNS
from qwen_pipeline.reports import CheckReport, Outcome, shown
from qwen_pipeline.text.reading import RecordUse
from qwen_pipeline.transforms.codes.fp8 import is_fp8

if TYPE_CHECKING:
    from qwen_pipeline.evaluation.structure.weights import WeightError

REPORT = "report.md"
PERPLEXITY_PLOT, DISTANCE_PLOT, ERROR_PLOT = "perplexity.png", "distance.png", "quantization_error.png"
LOSS_PLOT, STEPS_PLOT = "losses.png", "steps.png"
_MARKS: Mapping[Outcome, str] = MappingProxyType(
    {"passed": "✅ passed", "failed": "❌ failed", "warning": "⚠️ warning", "skipped": "⏭️ **skipped**"}
)
NO_PLOTS: Mapping[str, str] = MappingProxyType({})
QUALITY_COLUMNS = ("model", "tensors, MB", "perplexity", "change", "KL mean", "KL 99.9 %", "top-1 agreement")
HEAD_COLUMNS = ("model", "tensors, MB", "outputs", "error", "label agreement", "order of rewards", "cosine")
SERVED_COLUMNS = ("checkpoint", "engine", "ranks", "started", "equal answers", "largest gap, nats", "remark")
DIVERGENT_COLUMNS = ("prompt", "served", "from token", "gap, nats", "answer of Transformers", "served answer")
SCORE_COLUMNS = ("task/metric", "merged", "quantized", "standard error")
MAX_INLINE_BYTES = 400_000
"""Limit for the images inlined in one Markdown text, which Dagster keeps in its event log."""
_IMAGE = re.compile(r"!\[(?P<title>[^\]]*)\]\((?P<file>[\w.-]+\.png)\)\n*")


def render_report(
    findings: Findings, reports: Sequence[CheckReport], *, method: str, more_plots: Mapping[str, str] = NO_PLOTS
) -> str:
    """Return the report, which links to the plots in its directory; ``more_plots`` maps captions to file names."""
    sections = [
        "# Validation report",
        f"**{verdict(reports).capitalize()}.**",
        quality_table(findings.models, findings.nbytes),
        *filter(None, [padding_cost(findings)]),
        "## Checks",
        checks_table(reports),
        "## Tensor parallelism by engine",
        markup.table(COLUMNS, _texts(row.cells for row in findings.targets)),
        *_divergence_plots(findings),
        *(["## Serving", markup.table(SERVED_COLUMNS, _texts(served_rows(findings)))] if findings.served else []),
        *(
            ["## Divergent served answers", markup.table(DIVERGENT_COLUMNS, _texts(rows))]
            if (rows := divergent_rows(findings))
            else []
        ),
        *(
            ["## Behaviour", markup.table(BEHAVIOUR_COLUMNS, _texts(rows))]
            if (rows := behaviour_rows(findings.behaviour))
            else []
        ),
        *(["## Benchmark tasks", markup.table(SCORE_COLUMNS, _texts(score_rows(findings)))] if findings.tasks else []),
        "## Quantization error",
        f"![Error of each quantized weight, by layer]({ERROR_PLOT})",
        *(f"{caption}\n\n![{caption}]({file})" for caption, file in more_plots.items()),
        markup.table(
            ("weights with the largest error", "‖W - Wq‖ / ‖W‖"),
            [(markup.code(error.module), f"{error.relative:.4f}") for error in worst_weights(findings)],
        ),
        *(["## Sample answers"] if findings.task.kind == "language" else []),
        *(_side_by_side(sample) for sample in findings.samples),
        "## Method",
        markup.text(f"{method} Linear layers were loaded as {kernels(findings)}."),
    ]
    return "\n\n".join(sections) + "\n"


def _divergence_plots(findings: Findings) -> list[str]:
    if findings.task.kind != "language":
        return ["## Divergence of hidden states", f"![Drift of hidden states by layer]({DISTANCE_PLOT})"]
    return [
        f"![Perplexity by stage]({PERPLEXITY_PLOT})",
        "## Divergence of predictions",
        f"![KL along the context, and drift of hidden states by layer]({DISTANCE_PLOT})",
    ]


def method_of(measurement: Measurement) -> str:
    """Return a description of the method."""
    windows, seq_len = len(measurement.windows), len(measurement.windows[0])
    ran = (
        f"Models ran in float32, with one decoder layer in memory at a time, on {windows} windows of {seq_len} tokens,"
        " spread evenly over held-out text."
    )
    if measurement.task.kind != "language":
        return (
            f"{ran} The outputs of each model, which is {purpose(measurement.task)}, were compared with those of the"
            " merged one; the error is the norm of the differences over that of the merged outputs' deviations from"
            " their mean."
        )
    return (
        f"{ran} Every token but the first of each window is predicted from the preceding tokens of the window."
        " Perplexity is the exponential of the mean negative log-likelihood; KL is KL(merged || model) in nats per"
        " token; answers are greedy."
    )


def proof_of(measurement: Measurement, models: Mapping[str, ModelFigures]) -> str:
    """Return sentences about what was compared by values, what by digests, and what was computed instead of read."""
    by_digest = len(measurement.equal)
    sentences = [
        " Every code was compared with the weight that it stands for.",
        f" {by_digest} tensors that are not quantized have the same digests as before quantization, and the candidate's"
        " digests are those of its bytes; all others were compared value by value."
        if by_digest
        else " All tensors that are not quantized were compared value by value.",
        *(
            f" The weights of the {role} model were computed from those of the {found.computed_from} one, by the maps"
            " in its manifest."
            for role, found in models.items()
            if found.computed_from
        ),
    ]
    return "".join(sentences)


def ways_of_merging(inputs: ValidationInputs) -> str:
    """Return a sentence about the two ways in which a fine-tune was merged; empty if there is one."""
    if not inputs.other_merge:
        return ""
    return (
        f" The merged model was merged onto the base {reading_of_base(inputs.reference)}, the one {MERGED_OTHERWISE}"
        f" onto the base {reading_of_base(inputs.other_merge)}; the former is what was quantized."
    )


def rounded_inputs(config: Mapping[str, Any]) -> str:
    """Return a sentence about the inputs of a quantized model's layers, if engines round them."""
    if not is_fp8(config.get("quantization_config") or {}):
        return ""
    return " Inputs of layers with 8-bit floats were rounded to 8 bits too, with scales of each token, as by engines."


def skipped_records(held_out: RecordUse, candidate: Path) -> str:
    """Return sentences about records that could not be used, of the held-out text and in the candidate's calibration.

    The latter are in the manifest of the candidate, if this pipeline quantized it.
    """
    manifest = find_manifest(candidate)
    calibration: Any = manifest.result.get("calibration") if manifest else None
    skipped = calibration.get("skipped") if isinstance(calibration, Mapping) else None
    return "".join(
        f" Of the {text} text, {RecordUse.from_json(use)}"
        for text, use in (("held-out", held_out.to_json() if held_out.faults else None), ("calibration", skipped))
        if use
    )


def report_markdown(path: Path, *, max_inline_bytes: int = MAX_INLINE_BYTES) -> str:
    """Return a finished validation's report with inlined plots, for viewers that cannot follow relative links.

    Plots that would exceed ``max_inline_bytes`` of image data are omitted.

    Args:
        path: The directory that :func:`qwen_pipeline.stages.validate.validate` wrote.
        max_inline_bytes: Limit for the base64 text of all images.
    """
    free_bytes = max_inline_bytes

    def inline(image: re.Match[str]) -> str:
        nonlocal free_bytes
        data = base64.b64encode((path / image["file"]).read_bytes()).decode()
        if len(data) > free_bytes:
            return ""
        free_bytes -= len(data)
        return f"![{image['title']}](data:image/png;base64,{data})\n\n"

    return _IMAGE.sub(inline, (path / REPORT).read_text())


def quality_table(models: Mapping[str, ModelFigures], nbytes: Mapping[str, int]) -> str:
    """Return a table of models: size, perplexity and its change by the last step, divergence from the merged model."""
    return markup.table(quality_columns(models), quality_rows(models, nbytes))


def checks_table(reports: Sequence[CheckReport]) -> str:
    """Return a table of the checks."""
    return markup.table(
        ("outcome", "check", "measured", "limit", "detail"),
        [
            (_MARKS[report.outcome], *map(markup.text, (report.name, *report.figures, report.detail)))
            for report in reports
        ],
    )


def quality_columns(models: Mapping[str, ModelFigures]) -> Sequence[str]:
    """Return the header of :func:`quality_table`: of language models, or of models with another head."""
    return HEAD_COLUMNS if any(model.head for model in models.values()) else QUALITY_COLUMNS


def quality_rows(models: Mapping[str, ModelFigures], nbytes: Mapping[str, int]) -> Iterator[Sequence[str]]:
    """Yield the cells of :func:`quality_table`."""
    for role, model in models.items():
        size = f"{nbytes[role] / 1e6:,.1f}"
        if head := model.head:
            figures = (head.error, head.agreement, head.order, head.cosine)
            yield (role, size, str(head.outputs), *(shown(figure) for figure in figures))
            continue
        if model.perplexity is None:
            yield (role, size, "not loaded" if model.fault else "" if model.tokens else "not compared", "", "", "", "")
            continue
        divergence, origin = model.divergence, origin_of(role, models)
        before = models[origin].perplexity if origin else None
        yield (
            role,
            size,
            f"{model.perplexity:.3f}",
            f"{model.perplexity / before - 1:+.2%}" if before else "",
            *(
                (f"{divergence.mean:.3g}", f"{divergence.p99_9:.3g}", f"{divergence.top1_agreement:.2%}")
                if divergence
                else ("", "", "")
            ),
        )


def padding_cost(findings: Findings) -> str:
    """Return a sentence about the cost of padding; empty if it was not measured."""
    if (cost := findings.padding_cost) is None:
        return ""
    return f"KL(merged ‖ quantized) is {cost:.3f} times that of the merged model quantized without padding."


def served_rows(findings: Findings) -> list[Sequence[str]]:
    """Return a row of cells for each server, under :data:`SERVED_COLUMNS`."""
    return [
        (
            served.role,
            served.engine,
            str(served.degree),
            "yes" if served.ready else "no",
            f"{sum(part is None for part in served.partings)} of {len(served.partings)}" if served.partings else "",
            shown(max((part.gap for part in served.partings if part), default=None)),
            served.lacking or served.uncompared or served.fault or _served_outputs(served.head),
        )
        for served in findings.served
    ]


def _served_outputs(head: HeadFigures | None) -> str:
    """Return a clause about the outputs that an engine computed of a model with another head."""
    if head is None:
        return ""
    named = {
        "error": head.error,
        "label agreement": head.agreement,
        "order of rewards": head.order,
        "cosine": head.cosine,
    }
    figures = [f"{name} {shown(value)}" for name, value in named.items() if value is not None]
    return f"{head.outputs} outputs, compared with the merged model's: {', '.join(figures)}"


def divergent_rows(findings: Findings) -> list[Sequence[str]]:
    """Return a row for each served answer that differs from Transformers', under :data:`DIVERGENT_COLUMNS`."""
    return [
        (
            sample.prompt,
            served.name,
            str(part.position + 1),
            shown(part.gap),
            expected.strip(),
            text.strip(),
        )
        for served in findings.served
        if served.texts
        for sample, text, expected, part in zip(
            findings.samples, served.texts, served.expected, served.partings, strict=True
        )
        if part
    ]


def score_rows(findings: Findings) -> list[Sequence[str]]:
    """Return a row of cells for each metric, under :data:`SCORE_COLUMNS`."""
    return [(score.name, shown(score.merged), shown(score.quantized), shown(score.stderr)) for score in findings.tasks]


def changed_limits(limits: Limits) -> str:
    """Return a sentence that lists the limits that differ from the defaults; empty if there are none."""
    defaults = asdict(DEFAULT_LIMITS)
    changed = [
        f"{name} {shown(value)} (default {shown(defaults[name])})"
        for name, value in asdict(limits).items()
        if value != defaults[name]
    ]
    return f" Limits other than the defaults: {', '.join(changed)}." if changed else ""


def worst_weights(findings: Findings, count: int = 5) -> "list[WeightError]":
    """Return the weights with the largest quantization error, largest first."""
    return sorted(findings.structure.errors, key=lambda error: -error.relative)[:count]


def _side_by_side(sample: Sample) -> str:
    answers = markup.table(("merged", "quantized"), [(_cell(sample.reference), _cell(sample.candidate))])
    fault = markup.text(f"⚠️ The quantized answer {sample.fault}.") if sample.fault else ""
    return "\n\n".join(filter(None, [f"> {markup.text(sample.prompt)}", answers, fault]))


def kernels(findings: Findings) -> str:
    """Return the number and class of each model's linear layers, which identifies the kernels that ran."""
    return "; ".join(
        f"{role}: " + ", ".join(f"{count} {name}" for name, count in model.linears.items())
        for role, model in findings.models.items()
        if model.linears
    )


def _texts(rows: Iterable[Sequence[str]]) -> list[list[str]]:
    return [list(map(markup.text, row)) for row in rows]


def _cell(answer: Completion | None) -> str:
    return "*no answer*" if answer is None else markup.lines(answer.text.strip())
