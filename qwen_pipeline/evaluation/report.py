"""A validation as Markdown: the verdict first, then what it rests on."""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qwen_pipeline.evaluation.checks import verdict
from qwen_pipeline.evaluation.figures import ModelFigures
from qwen_pipeline.evaluation.findings import Findings
from qwen_pipeline.evaluation.samples import Sample
from qwen_pipeline.reports import CheckReport

REPORT, PERPLEXITY_PLOT, ERROR_PLOT = "report.md", "perplexity.png", "quantization_error.png"
MAX_INLINE_BYTES = 400_000
"""Of images inlined in one Markdown text, which Dagster keeps in its event log."""
_IMAGE = re.compile(r"!\[(?P<title>[^\]]*)\]\((?P<file>[\w.-]+\.png)\)\n*")


def render_report(findings: Findings, reports: Sequence[CheckReport], *, windows: int, seq_len: int) -> str:
    """Return the report; the plots lie beside it."""
    sections = [
        "# Validation report",
        f"**{verdict(reports).capitalize()}.**",
        quality_table(findings.models, findings.nbytes),
        "## Checks",
        checks_table(reports),
        f"![Perplexity by stage]({PERPLEXITY_PLOT})",
        "## Where quantization loses",
        f"![Error of each quantized weight, by layer]({ERROR_PLOT})",
        _worst_weights(findings),
        "## Answers side by side",
        *(_side_by_side(sample) for sample in findings.samples),
        "## How it was measured",
        f"Plain Transformers on the CPU in float32. {windows} windows of {seq_len} tokens, spread evenly over held-out"
        " text; every token but the first of each window is predicted from those before it in the window. Perplexity is"
        " `exp` of the mean surprise; KL is KL(merged || model) in nats a token; answers are greedy. Linear layers"
        f" ran as {_kernels(findings)}.",
    ]
    return "\n\n".join(sections) + "\n"


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
    """Return one row a model: size, perplexity, its change from the model before, distance from the merged model."""
    return _table(
        ("model", "tensors, MB", "perplexity", "change", "KL mean", "KL 99.9 %", "top-1 agreement"),
        _quality_rows(models, nbytes),
    )


def checks_table(reports: Sequence[CheckReport]) -> str:
    """Return one row a check."""
    return _table(
        ("", "check", "measured", "limit", ""),
        [
            (
                "✅" if report.passed else "❌" if report.blocks else "⚠️",
                report.name,
                *report.figures,
                report.detail,
            )
            for report in reports
        ],
    )


def _quality_rows(models: Mapping[str, ModelFigures], nbytes: Mapping[str, int]) -> Iterator[Sequence[str]]:
    before = None
    for role, model in models.items():
        size = f"{nbytes[role] / 1e6:,.1f}"
        if model.perplexity is None:
            yield (role, size, "not loaded", "", "", "", "")
            continue
        divergence = model.divergence
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
        before = model.perplexity


def _worst_weights(findings: Findings, count: int = 5) -> str:
    worst = sorted(findings.structure.errors, key=lambda error: -error.relative)[:count]
    return _table(("worst weights", "‖W - Wq‖ / ‖W‖"), [(f"`{e.module}`", f"{e.relative:.4f}") for e in worst])


def _side_by_side(sample: Sample) -> str:
    answers = [("merged", "quantized"), (_cell(sample.reference), _cell(sample.candidate))]
    fault = f"\n\n⚠️ The quantized answer {sample.fault}." if sample.fault else ""
    return f"> {sample.prompt}\n\n" + _table(answers[0], answers[1:]) + fault


def _kernels(findings: Findings) -> str:
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


def _cell(answer: str | None) -> str:
    return "*not loaded*" if answer is None else answer.strip().replace("\n", "<br>")
