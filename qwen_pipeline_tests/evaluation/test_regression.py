"""A release is compared with the previous one only on the same text."""

from dataclasses import replace
from pathlib import Path

import pytest

from qwen_pipeline.checkpoint.store.destinations import Artifact
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.figures import DivergenceFigures, ModelFigures
from qwen_pipeline.evaluation.regression import ValidationVerdict, changes, compare, load_verdict

FIGURES = ModelFigures(
    perplexity=10.0, divergence=DivergenceFigures(mean=0.1, p95=0.2, p99_9=0.3, max=0.4, top1_agreement=0.9)
)
RELEASED = ValidationVerdict(quantized=FIGURES, text="sha256:1")


def with_perplexity(value: float) -> ValidationVerdict:
    return replace(RELEASED, quantized=replace(FIGURES, perplexity=value))


@pytest.mark.parametrize(("perplexity", "passed"), [(9.0, True), (10.2, True), (10.3, False)])
def test_a_worse_model_is_reported_by_how_much(perplexity: float, passed: bool) -> None:
    report = compare(RELEASED, with_perplexity(perplexity))
    assert report.passed == passed
    assert not report.blocks
    assert report.measured == pytest.approx(perplexity / 10)
    assert f"perplexity 10 -> {perplexity:g}" in report.detail
    assert ("Regressed by 3.0%" in report.detail) != passed


def test_what_cannot_be_compared_is_skipped_or_warns() -> None:
    first, other_text = compare(None, RELEASED), compare(RELEASED, replace(RELEASED, text="sha256:2"))
    assert "no earlier release" in first.detail
    assert "other held-out text" in other_text.detail
    assert first.outcome == other_text.outcome == "skipped"
    unloaded = replace(RELEASED, quantized=ModelFigures(fault="OSError: no"))
    assert compare(RELEASED, unloaded).outcome == "warning"
    assert [change.figure for change in changes(RELEASED, RELEASED)] == [
        "perplexity", "mean KL", "KL 99.9 %", "top-1 agreement",
    ]  # fmt: skip


@pytest.mark.parametrize(("mean", "tail", "lost"), [(0.05, 0.2, False), (0.05, 0.5, True), (0.2, 0.5, False)])
def test_a_better_mean_with_a_worse_tail_says_so(mean: float, tail: float, lost: bool) -> None:
    assert FIGURES.divergence
    now = replace(FIGURES, perplexity=9.9, divergence=replace(FIGURES.divergence, mean=mean, p99_9=tail))
    report = compare(RELEASED, replace(RELEASED, quantized=now))
    assert report.passed != lost
    assert ("its tail grew" in report.detail) == lost
    assert f"KL 99.9 % 0.3 -> {tail:g}" in report.detail
    assert report.measured == pytest.approx(tail / 0.3 if lost else 0.99)


def test_verdicts_are_read_from_validations(validated: Artifact, tmp_path: Path) -> None:
    verdict = load_verdict(validated.path)
    assert verdict.text == validated.manifest.derivation.inputs["text"]
    assert verdict.quantized.perplexity
    with pytest.raises(InputRefused, match="has no validation report"):
        load_verdict(tmp_path)
