"""The validation report as one HTML file, which works offline and in light and dark mode."""

import base64
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from qwen_pipeline.evaluation.behaviour.checks import COLUMNS as BEHAVIOUR_COLUMNS
from qwen_pipeline.evaluation.behaviour.checks import behaviour_rows
from qwen_pipeline.evaluation.checks import verdict
from qwen_pipeline.evaluation.findings import MERGED, PADDED, QUANTIZED, Findings
from qwen_pipeline.evaluation.report.markdown import (
    DIVERGENT_COLUMNS,
    SCORE_COLUMNS,
    SERVED_COLUMNS,
    divergent_rows,
    kernels,
    padding_cost,
    quality_columns,
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
    """Return the page, with all images and styles inlined.

    Args:
        findings: The findings.
        reports: The report of each check.
        plots: Caption -> PNG file.
        lineage: The steps up to the candidate, as returned by :func:`qwen_pipeline.checkpoint.store.lineage.dump_step`.
        method: A description of the method.
    """
    return _template().render(
        title=verdict(reports).capitalize(),
        failed=any(report.blocks for report in reports),
        tiles=_tiles(findings),
        quality_columns=quality_columns(findings.models),
        quality=list(quality_rows(findings.models, findings.nbytes)),
        padding_cost=padding_cost(findings),
        reports=reports,
        plots={caption: base64.b64encode(file.read_bytes()).decode() for caption, file in plots.items()},
        served=served_rows(findings),
        served_columns=SERVED_COLUMNS,
        divergent=divergent_rows(findings),
        divergent_columns=DIVERGENT_COLUMNS,
        behaviour=behaviour_rows(findings.behaviour),
        behaviour_columns=BEHAVIOUR_COLUMNS,
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
    """Return the key figures: name, value, unit."""
    if findings.task.kind != "language":
        return _head_tiles(findings)
    quantized, padded = findings.models[QUANTIZED].divergence, findings.models.get(PADDED)
    ratio = findings.perplexity_ratio(QUANTIZED, to=MERGED)
    of_padding = padded.divergence if padded else None
    cost, sizes = findings.padding_cost, findings.nbytes
    return [
        ("Perplexity, quantized / merged", shown(ratio) or "-", "ratio"),
        ("KL(merged ‖ quantized)", shown(quantized.mean) if quantized else "-", "mean, nats per token"),
        ("Top-1 agreement", f"{quantized.top1_agreement:.1%}" if quantized else "-", "of tokens, with merged"),
        ("KL(merged ‖ padded)", shown(of_padding.mean) if of_padding else "-", "mean, nats per token"),
        *([("KL, padded / unpadded", shown(cost) or "-", "ratio, after quantization")] if cost else []),
        ("Size", f"{sizes[QUANTIZED] / sizes[MERGED]:.0%}" if sizes.get(MERGED) else "-", "of the merged weights"),
    ]


def _head_tiles(findings: Findings) -> list[tuple[str, str, str]]:
    head, sizes = findings.models[QUANTIZED].head, findings.nbytes
    figures = {
        "Error of the outputs": (head.error, "of their deviations, to merged"),
        "Label agreement": (head.agreement, "share, with merged"),
        "Order of rewards": (head.order, "share of pairs, as merged"),
        "Cosine": (head.cosine, "mean, with merged"),
    } if head else {}  # fmt: skip
    tiles = [(name, shown(value), unit) for name, (value, unit) in figures.items() if value is not None]
    size = f"{sizes[QUANTIZED] / sizes[MERGED]:.0%}" if sizes.get(MERGED) else "-"
    return [*tiles, ("Size", size, "of the merged weights")]


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
