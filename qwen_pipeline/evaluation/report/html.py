"""A validation as one HTML file: it opens offline, in light and in dark, and reads from the verdict to the evidence."""

import base64
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from qwen_pipeline.evaluation.checks import verdict
from qwen_pipeline.evaluation.findings import MERGED, PADDED, QUANTIZED, Findings
from qwen_pipeline.evaluation.report.markdown import (
    PARTED_COLUMNS,
    QUALITY_COLUMNS,
    SCORE_COLUMNS,
    SERVED_COLUMNS,
    kernels,
    padding_cost,
    parted_rows,
    quality_rows,
    score_rows,
    served_rows,
    worst_weights,
)
from qwen_pipeline.evaluation.tensor_parallel.findings import COLUMNS
from qwen_pipeline.reports import CheckReport, shown

PAGE = "report.html"


def render_page(
    findings: Findings,
    reports: Sequence[CheckReport],
    *,
    plots: Mapping[str, Path],
    lineage: Sequence[Mapping[str, Any]],
    method: str,
) -> str:
    """Return the page, with every image and style inside it.

    Args:
        findings: What was measured.
        reports: The verdict on it, a report for each check.
        plots: Caption -> PNG file.
        lineage: The steps that led here, as :func:`qwen_pipeline.checkpoint.store.lineage.dump_step` gives them.
        method: How it was measured, in a sentence or two.
    """
    return _template().render(
        title=verdict(reports).capitalize(),
        failed=any(report.blocks for report in reports),
        tiles=_tiles(findings),
        quality_columns=QUALITY_COLUMNS,
        quality=list(quality_rows(findings.models, findings.nbytes)),
        padding_cost=padding_cost(findings),
        reports=reports,
        plots={caption: base64.b64encode(file.read_bytes()).decode() for caption, file in plots.items()},
        served=served_rows(findings),
        served_columns=SERVED_COLUMNS,
        parted=parted_rows(findings),
        parted_columns=PARTED_COLUMNS,
        scores=score_rows(findings),
        score_columns=SCORE_COLUMNS,
        worst=worst_weights(findings),
        samples=findings.samples,
        target_columns=COLUMNS,
        targets=[(row, row.cells) for row in findings.targets],
        lineage=lineage,
        method=method,
        kernels=kernels(findings),
    )


def _tiles(findings: Findings) -> list[tuple[str, str, str]]:
    """Return the figures that people ask for first: what, value, unit."""
    quantized, padded = findings.models[QUANTIZED].divergence, findings.models.get(PADDED)
    ratio = findings.perplexity_ratio(QUANTIZED, to=MERGED)
    silent = padded.divergence if padded else None
    cost, sizes = findings.padding_cost, findings.nbytes
    return [
        ("Perplexity, quantized over merged", shown(ratio) or "-", "ratio"),
        ("KL(merged ‖ quantized)", shown(quantized.mean) if quantized else "-", "nats a token, mean"),
        ("Same next token", f"{quantized.top1_agreement:.1%}" if quantized else "-", "top-1 agreement"),
        ("KL(merged ‖ padded)", shown(silent.mean) if silent else "-", "nats a token, mean"),
        *([("KL, padded over unpadded", shown(cost) or "-", "ratio, quantized")] if cost else []),
        ("Size", f"{sizes[QUANTIZED] / sizes[MERGED]:.0%}" if sizes.get(MERGED) else "-", "of the merged weights"),
    ]


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")
