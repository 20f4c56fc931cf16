"""Write the validation report: HTML, Markdown, plots and JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_pipeline.evaluation.findings import Findings
from qwen_pipeline.evaluation.report.html import PAGE, render_page
from qwen_pipeline.evaluation.report.load import REPORT_JSON
from qwen_pipeline.evaluation.report.markdown import DISTANCE_PLOT, ERROR_PLOT, PERPLEXITY_PLOT, REPORT, render_report
from qwen_pipeline.evaluation.report.plots import draw_distance, draw_perplexity, draw_quantization_error
from qwen_pipeline.reports import CheckReport


def write_report(
    root: Path,
    findings: Findings,
    reports: Sequence[CheckReport],
    result: Mapping[str, Any],
    *,
    lineage: Sequence[Mapping[str, Any]],
    method: str,
    more_plots: Mapping[str, str],
) -> None:
    """Write the reports of :func:`render_page` and :func:`render_report`, the plots and ``result`` into ``root``.

    The files of ``more_plots`` (caption -> file name) already exist.
    """
    is_language = findings.task.kind == "language"
    if is_language:
        draw_perplexity(findings, root / PERPLEXITY_PLOT)
    draw_distance(findings, root / DISTANCE_PLOT)
    draw_quantization_error(findings, root / ERROR_PLOT)
    perplexity = {"Perplexity on held-out text, and the change by each stage": root / PERPLEXITY_PLOT}
    distance = "KL along the context, and drift of hidden states by layer"
    plots = {
        **(perplexity if is_language else {}),
        distance if is_language else "Drift of hidden states by layer": root / DISTANCE_PLOT,
        "Error of each quantized weight by layer": root / ERROR_PLOT,
        **{caption: root / file for caption, file in more_plots.items()},
    }
    (root / PAGE).write_text(render_page(findings, reports, plots=plots, lineage=lineage, method=method))
    (root / REPORT).write_text(render_report(findings, reports, method=method, more_plots=more_plots))
    (root / REPORT_JSON).write_text(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
