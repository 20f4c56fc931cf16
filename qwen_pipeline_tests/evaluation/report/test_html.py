"""The report as HTML and Markdown, and its plots."""

from dataclasses import replace
from pathlib import Path

from qwen_pipeline.evaluation.checks import judge
from qwen_pipeline.evaluation.figures import Stretch
from qwen_pipeline.evaluation.findings import BASE, MERGED, PADDED, QUANTIZED, UNPADDED_QUANTIZED, origin_of
from qwen_pipeline.evaluation.limits import Limits
from qwen_pipeline.evaluation.report.html import render_page
from qwen_pipeline.evaluation.report.markdown import changed_limits, quality_rows, render_report
from qwen_pipeline.evaluation.report.plots import draw_distance, draw_perplexity
from qwen_pipeline.evaluation.serving.findings import FirstDivergence
from qwen_pipeline_tests.evaluation.example_findings import CLOSE, GOOD, HELD, SERVED

STRETCHES = tuple(Stretch(first=8 * n, mean=0.1 + 0.01 * n, median=0.05, p95=0.3) for n in range(8))
QUANTIZED_MODEL = replace(GOOD.models[QUANTIZED], divergence=replace(CLOSE, stretches=STRETCHES), drift=(0.01, 0.02))
FOUND = replace(GOOD, models={**GOOD.models, QUANTIZED: QUANTIZED_MODEL}, served=[SERVED], tasks=[HELD])


def test_what_was_served_and_scored_is_shown(tmp_path: Path) -> None:
    found = replace(FOUND, nbytes=dict.fromkeys(FOUND.models, 1))
    reports = judge(found, Limits())
    draw_distance(found, tmp_path / "distance.png")
    page = render_page(found, reports, plots={"distance": tmp_path / "distance.png"}, lineage=[], method="So.")
    markdown = render_report(found, reports, method="So.")
    for words in ("Serving", "1 of 1", "Benchmark tasks", "arc/acc", "0.49"):
        assert words in page
        assert words in markdown
    without = render_page(replace(found, served=(), tasks=()), reports, plots={}, lineage=[], method="So.")
    assert "<h2>Serving" not in without
    assert "Benchmark tasks" not in without


def test_skipped_checks_are_shown_as_skipped_with_the_reason() -> None:
    found = replace(GOOD, nbytes=dict.fromkeys(GOOD.models, 1))
    reports = judge(found, Limits())
    why = "No serving engine is configured (validation.serve.engine)."
    assert f"| ⏭️ **skipped** | serves |  |  | {why} |" in render_report(found, reports, method="So.")
    page = render_page(found, reports, plots={}, lineage=[], method="So.")
    row = f'<td class="name"><code>serves</code></td><td class="number"></td>\n<td class="number"></td><td>{why}</td>'
    assert f'<tr class="skipped"><td class="name skipped">- skipped</td>\n{row}' in page
    assert "Passed: 17 of 17 checks that ran; skipped: serves, benchmark_tasks" in page


def test_a_divergent_served_answer_is_shown_beside_that_of_transformers() -> None:
    parting = FirstDivergence(position=1, gap=2.5)
    parted = replace(SERVED, role="quantized", texts=("Maybe",), expected=("Yes!",), partings=(parting,))
    found = replace(FOUND, nbytes=dict.fromkeys(FOUND.models, 1), served=[parted])
    reports = judge(found, Limits())
    page = render_page(found, reports, plots={}, lineage=[], method="So.")
    assert "<td>Yes!</td>\n<td>Maybe</td>" in page.replace("</td><td>", "</td>\n<td>")
    assert "| ? | quantized on 3 ranks | 2 | 2.5 | Yes! | Maybe |" in render_report(found, reports, method="So.")


def test_every_change_is_relative_to_the_source_model(tmp_path: Path) -> None:
    unpadded = replace(QUANTIZED_MODEL, perplexity=12.0, divergence=replace(CLOSE, mean=0.08))
    found = replace(FOUND, models={**FOUND.models, UNPADDED_QUANTIZED: unpadded})
    assert found.padding_cost == 0.1 / 0.08
    assert [origin_of(role, found.models) for role in found.models] == [None, BASE, MERGED, PADDED, MERGED]
    changes = {row[0]: row[3] for row in quality_rows(found.models, dict.fromkeys(found.models, 1))}
    assert changes == {
        BASE: "",
        MERGED: "-50.00%",
        PADDED: "+0.00%",
        QUANTIZED: "+10.00%",
        UNPADDED_QUANTIZED: "+20.00%",
    }
    draw_perplexity(FOUND, tmp_path / "without.png")
    draw_perplexity(found, tmp_path / "with.png")
    assert (tmp_path / "with.png").stat().st_size > (tmp_path / "without.png").stat().st_size


def test_plots_without_data_are_written(tmp_path: Path) -> None:
    draw_distance(GOOD, tmp_path / "empty.png")
    draw_distance(FOUND, tmp_path / "full.png")
    assert (tmp_path / "full.png").stat().st_size > (tmp_path / "empty.png").stat().st_size > 1000


def test_limits_other_than_the_defaults_are_named() -> None:
    assert changed_limits(Limits()) == ""
    assert changed_limits(Limits(max_mean_kl=0.4)) == " Limits other than the defaults: max_mean_kl 0.4 (default 0.3)."
