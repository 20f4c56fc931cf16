"""A validation as Markdown: the verdict first, then what it rests on."""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from qwen_pipeline.evaluation.checks import verdict
from qwen_pipeline.evaluation.figures import ModelFigures
from qwen_pipeline.evaluation.findings import QUANTIZED, Findings, origin_of
from qwen_pipeline.evaluation.limits import DEFAULT_LIMITS, Limits
from qwen_pipeline.evaluation.samples import Completion, Sample
from qwen_pipeline.evaluation.tensor_parallel.findings import COLUMNS
from qwen_pipeline.reports import CheckReport, Outcome, shown

if TYPE_CHECKING:
    from qwen_pipeline.evaluation.structure.weights import WeightError

REPORT = "report.md"
PERPLEXITY_PLOT, DISTANCE_PLOT, ERROR_PLOT = "perplexity.png", "distance.png", "quantization_error.png"
LOSS_PLOT = "losses.png"
_MARKS: Mapping[Outcome, str] = MappingProxyType(
    {"passed": "✅ passed", "failed": "❌ failed", "warning": "⚠️ warning", "skipped": "⏭️ **skipped**"}
)
NO_PLOTS: Mapping[str, str] = MappingProxyType({})
QUALITY_COLUMNS = ("model", "tensors, MB", "perplexity", "change", "KL mean", "KL 99.9 %", "top-1 agreement")
SERVED_COLUMNS = ("checkpoint", "engine", "ranks", "came up", "answers equal to Transformers'", "widest gap, nats", "")
PARTED_COLUMNS = ("prompt", "served", "parts at token", "gap, nats", "Transformers' answer", "served answer")
SCORE_COLUMNS = ("task/metric", "merged", "quantized", "its standard error")
MAX_INLINE_BYTES = 400_000
"""Of images inlined in one Markdown text, which Dagster keeps in its event log."""
_IMAGE = re.compile(r"!\[(?P<title>[^\]]*)\]\((?P<file>[\w.-]+\.png)\)\n*")


def render_report(
    findings: Findings, reports: Sequence[CheckReport], *, method: str, more_plots: Mapping[str, str] = NO_PLOTS
) -> str:
    """Return the report; the plots lie beside it, ``more_plots`` by their captions."""
    sections = [
        "# Validation report",
        f"**{verdict(reports).capitalize()}.**",
        quality_table(findings.models, findings.nbytes),
        *filter(None, [padding_cost(findings)]),
        "## Checks",
        checks_table(reports),
        "## On the ranks of each engine",
        _table(COLUMNS, [row.cells for row in findings.targets]),
        f"![Perplexity by stage]({PERPLEXITY_PLOT})",
        "## Where predictions part",
        f"![KL along the context, and drift of hidden states by layer]({DISTANCE_PLOT})",
        *(["## Served for real", _table(SERVED_COLUMNS, served_rows(findings))] if findings.served else []),
        *(["## Served answers that part", _table(PARTED_COLUMNS, parted)] if (parted := parted_rows(findings)) else []),
        *(["## Benchmark tasks", _table(SCORE_COLUMNS, score_rows(findings))] if findings.tasks else []),
        "## Where quantization loses",
        f"![Error of each quantized weight, by layer]({ERROR_PLOT})",
        *(f"{caption}\n\n![{caption}]({file})" for caption, file in more_plots.items()),
        _table(
            ("worst weights", "‖W - Wq‖ / ‖W‖"),
            [(f"`{error.module}`", f"{error.relative:.4f}") for error in worst_weights(findings)],
        ),
        "## Answers side by side",
        *(_side_by_side(sample) for sample in findings.samples),
        "## How it was measured",
        f"{method} Linear layers ran as {kernels(findings)}.",
    ]
    return "\n\n".join(sections) + "\n"


def method_of(windows: int, seq_len: int) -> str:
    """Say how the figures came about."""
    return (
        f"In float32, one decoder layer in memory at a time. {windows} windows of {seq_len} tokens, spread evenly over"
        " held-out text; every token but the first of each window is predicted from those before it in the window."
        " Perplexity is the exponential of the mean surprise; KL is KL(merged || model) in nats a token; answers are"
        " greedy, and those of plain Transformers."
    )


def report_markdown(path: Path, *, max_inline_bytes: int = MAX_INLINE_BYTES) -> str:
    """Return a finished validation's report with its plots inside, for viewers that cannot follow relative links.

    Plots that would take it beyond ``max_inline_bytes`` of image data are left out.

    Args:
        path: The directory that :func:`qwen_pipeline.stages.validate.validate` made.
        max_inline_bytes: Bound on the base64 text of all images.
    """
    room = max_inline_bytes

    def inline(image: re.Match[str]) -> str:
        nonlocal room
        data = base64.b64encode((path / image["file"]).read_bytes()).decode()
        if len(data) > room:
            return ""
        room -= len(data)
        return f"![{image['title']}](data:image/png;base64,{data})\n\n"

    return _IMAGE.sub(inline, (path / REPORT).read_text())


def quality_table(models: Mapping[str, ModelFigures], nbytes: Mapping[str, int]) -> str:
    """Return one row a model: size, perplexity, its change from what it came from, distance from the merged model."""
    return _table(QUALITY_COLUMNS, quality_rows(models, nbytes))


def checks_table(reports: Sequence[CheckReport]) -> str:
    """Return one row a check."""
    return _table(
        ("outcome", "check", "measured", "limit", "detail"),
        [(_MARKS[report.outcome], report.name, *report.figures, report.detail) for report in reports],
    )


def quality_rows(models: Mapping[str, ModelFigures], nbytes: Mapping[str, int]) -> Iterator[Sequence[str]]:
    """Yield the cells of :func:`quality_table`."""
    for role, model in models.items():
        size = f"{nbytes[role] / 1e6:,.1f}"
        if model.perplexity is None:
            yield (role, size, "not loaded", "", "", "", "")
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
    """Say what padding changed about quantization; nothing where that was not measured."""
    if (cost := findings.padding_cost) is None:
        return ""
    return f"KL(merged ‖ quantized) is {cost:.3f} times that of the merged model quantized without padding."


def served_rows(findings: Findings) -> list[Sequence[str]]:
    """Return the cells of one row a server, under :data:`SERVED_COLUMNS`."""
    return [
        (
            served.role,
            served.engine,
            str(served.degree),
            "yes" if served.ready else "no",
            f"{sum(part is None for part in served.partings)} of {len(served.partings)}" if served.partings else "",
            shown(max((part.gap for part in served.partings if part), default=None)),
            served.lacking or served.fault or "",
        )
        for served in findings.served
    ]


def parted_rows(findings: Findings) -> list[Sequence[str]]:
    """Return the cells of one row a served answer that is not Transformers', under :data:`PARTED_COLUMNS`."""
    return [
        (
            sample.prompt,
            served.name,
            str(part.position + 1),
            shown(part.gap),
            own.text.strip() if (own := sample.candidate if served.role == QUANTIZED else sample.reference) else "",
            text.strip(),
        )
        for served in findings.served
        if served.texts
        for sample, text, part in zip(findings.samples, served.texts, served.partings, strict=True)
        if part
    ]


def score_rows(findings: Findings) -> list[Sequence[str]]:
    """Return the cells of one row a metric, under :data:`SCORE_COLUMNS`."""
    return [(score.name, shown(score.merged), shown(score.quantized), shown(score.stderr)) for score in findings.tasks]


def own_limits(limits: Limits) -> str:
    """Say which limits are not the defaults."""
    usual = asdict(DEFAULT_LIMITS)
    own = [
        f"{name} {shown(value)} (usually {shown(usual[name])})"
        for name, value in asdict(limits).items()
        if value != usual[name]
    ]
    return f" Limits set for it: {', '.join(own)}." if own else ""


def worst_weights(findings: Findings, count: int = 5) -> "list[WeightError]":
    """Return the weights that quantization changed most, worst first."""
    return sorted(findings.structure.errors, key=lambda error: -error.relative)[:count]


def _side_by_side(sample: Sample) -> str:
    answers = _table(("merged", "quantized"), [(_cell(sample.reference), _cell(sample.candidate))])
    fault = f"⚠️ The quantized answer {sample.fault}." if sample.fault else ""
    return "\n\n".join(filter(None, [f"> {sample.prompt}", answers, fault]))


def kernels(findings: Findings) -> str:
    """Name the classes of each model's linear layers, which tells the kernels that ran."""
    return "; ".join(
        f"{role}: " + ", ".join(f"{count} {name}" for name, count in model.linears.items())
        for role, model in findings.models.items()
        if model.linears
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]] | Iterator[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def _cell(answer: Completion | None) -> str:
    return "*no answer*" if answer is None else answer.text.strip().replace("\n", "<br>")
