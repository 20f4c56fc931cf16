"""The checks: each threshold decides its own check, and a check without a measurement never passes."""

from dataclasses import replace
from math import inf, nan

import pytest

from qwen_pipeline.evaluation.checks import CHECKS, judge, verdict
from qwen_pipeline.evaluation.figures import DivergenceFigures, ModelFigures
from qwen_pipeline.evaluation.findings import MERGED, QUANTIZED, Findings, rounded
from qwen_pipeline.evaluation.head_checks import DRAFTS, HEAD_CHECKS, concerning
from qwen_pipeline.evaluation.limits import Limits
from qwen_pipeline.evaluation.samples import Sample
from qwen_pipeline.evaluation.structure.weights import PaddingFindings
from qwen_pipeline.evaluation.tensor_parallel.findings import (
    ANY_ENGINE,
)
from qwen_pipeline.qwen.tensor_parallel.feasibility import assess_degrees
from qwen_pipeline.reports import CheckReport
from qwen_pipeline_tests.evaluation.example_findings import CONFIG, GOOD, SMALL_PEAK, YES, target_findings


def failed(findings: Findings, limits: Limits | None = None) -> dict[str, CheckReport]:
    reports = judge(findings, limits or Limits())
    assert [report.name for report in reports] == [check.name for check in CHECKS]
    return {report.name: report for report in reports if report.outcome in ("failed", "warning")}


def with_model(role: str, model: ModelFigures) -> Findings:
    return replace(GOOD, models={**GOOD.models, role: model})


def test_a_good_model_passes_everything() -> None:
    assert failed(GOOD) == {}
    assert verdict(judge(GOOD, Limits())) == "passed: 17 of 17 checks that ran; skipped: serves, benchmark_tasks"


def test_a_verdict_names_what_was_skipped_and_does_not_count_it_as_passed() -> None:
    of_language = [
        check.skipped("") if check in (*HEAD_CHECKS, DRAFTS) else check.report(passed=True, detail="")
        for check in CHECKS
    ]
    kept = of_language[:-3]
    left = [CHECKS[-3].report(passed=False, detail=""), *(check.skipped("") for check in CHECKS[-2:])]
    assert verdict([*kept, *left]) == (
        "passed: 16 of 17 checks that ran, with warnings: sample_texts; skipped: serves, benchmark_tasks"
    )
    failed = CHECKS[0].report(passed=False, detail="")
    assert verdict([failed, *kept[1:], *left]) == (
        "failed: structure, with warnings: sample_texts; skipped: serves, benchmark_tasks"
    )


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        (Limits(max_perplexity_ratio=1.05), "perplexity_ratio"),
        (Limits(max_mean_kl=0.05), "kl_divergence"),
        (Limits(min_top1_agreement=0.95), "top1_agreement"),
        (Limits(max_padding_kl=1e-10), "padding_is_silent"),
        (Limits(max_merged_ratio=0.4), "merged_not_worse"),
    ],
)
def test_each_limit_decides_one_check(limits: Limits, name: str) -> None:
    assert failed(GOOD, limits).keys() == {name}


def test_structure_padding_and_answers_are_reported() -> None:
    problems = replace(GOOD, structure=replace(GOOD.structure, problems=["x.scales is missing."]))
    assert failed(problems)["structure"].detail == "x.scales is missing."
    audible = replace(GOOD, structure=replace(GOOD.structure, padding=PaddingFindings(audible=["down_proj: loud"])))
    assert "down_proj: loud" in failed(audible)["padding_is_silent"].detail
    (agreed,) = (report for report in judge(GOOD, Limits()) if report.name == "sample_texts")
    assert "at the start of both answers: 2 of 2." in agreed.detail
    broken = replace(GOOD, samples=[Sample(prompt="?", reference=YES, candidate=replace(YES, text="!" * 9))])
    (report,) = failed(broken).values()
    assert not report.blocks
    mute = with_model(QUANTIZED, replace(GOOD.models[QUANTIZED], unanswered="IndexError: out of range"))
    (report,) = failed(mute).values()
    assert report.name == "sample_texts"
    assert "no answers from quantized: IndexError: out of range." in report.detail


def test_a_candidate_that_does_not_load_fails_what_needs_it() -> None:
    found = failed(with_model(QUANTIZED, ModelFigures(fault="ValueError: no")))
    unmeasured = {"perplexity_ratio", "kl_divergence", "top1_agreement", "float16_range"}
    assert found.keys() == {"loads_in_transformers"} | unmeasured
    assert found["loads_in_transformers"].detail == "quantized: ValueError: no"
    assert found["kl_divergence"].detail == "Not measured, because these models did not load: quantized."


def test_experts_that_transformers_initializes_randomly_warn() -> None:
    quantized = replace(GOOD.models[QUANTIZED], unplaced="missing_keys: experts.down_proj")
    (report,) = failed(with_model(QUANTIZED, quantized)).values()
    assert report.name == "loads_in_transformers"
    assert not report.blocks
    assert "quantized: missing_keys: experts.down_proj" in report.detail


def test_a_perplexity_that_is_not_a_number_fails() -> None:
    nans = DivergenceFigures(mean=nan, p95=nan, p99_9=nan, max=nan, top1_agreement=0)
    found = failed(with_model(QUANTIZED, ModelFigures(perplexity=nan, divergence=nans, peaks=(SMALL_PEAK,))))
    assert found.keys() == {"perplexity_ratio", "kl_divergence", "top1_agreement"}
    assert rounded(found["kl_divergence"].measured) == "nan"


def test_widths_that_ranks_cannot_share_block_and_heads_warn() -> None:
    width = failed(replace(GOOD, parallel=assess_degrees(CONFIG, group_size=32, degrees=[2])[0]))["tensor_parallel"]
    assert width.blocks
    assert "pad intermediate_size from 96 to 128" in width.detail
    heads = failed(replace(GOOD, parallel=assess_degrees(CONFIG, group_size=32, degrees=[3])[0]))["tensor_parallel"]
    assert not heads.blocks
    assert "4 attention heads are not divisible by 3" in heads.detail
    assert failed(replace(GOOD, parallel=None))["tensor_parallel"].blocks


@pytest.mark.parametrize("magnitude", [40_000.0, inf, nan])
def test_an_activation_near_the_float16_maximum_warns_and_names_its_layer(magnitude: float) -> None:
    quantized = replace(GOOD.models[QUANTIZED], peaks=(SMALL_PEAK, replace(SMALL_PEAK, layer=7, magnitude=magnitude)))
    (report,) = failed(with_model(QUANTIZED, quantized)).values()
    assert report.name == "float16_range"
    assert not report.blocks
    assert "at mlp.down_proj of layer 7 on held-out text" in report.detail


def test_the_text_with_the_largest_activation_is_named() -> None:
    loud = replace(GOOD.models[QUANTIZED], calibration_peaks=(replace(SMALL_PEAK, layer=7, magnitude=40_000.0),))
    (report,) = failed(with_model(QUANTIZED, loud)).values()
    assert report.detail == (
        "The largest activation is at mlp.down_proj of layer 7 on its calibration tokens; float16 ends at 65504."
        " On held-out text it is 30. Serve the model in bfloat16, with an engine that computes in it."
    )


def test_no_declared_engine_may_refuse_or_give_wrong_answers() -> None:
    wrong = failed(
        replace(GOOD, targets=[target_findings("vllm-cpu"), target_findings("vllm-machete", down_proj=0.5)])
    )["ranks_agree"]
    assert wrong.blocks
    assert wrong.measured == 1
    assert (
        "vllm-machete at 2 gives wrong answers without an error: 1 of 7 weights differ, down_proj by 50%"
        in wrong.detail
    )
    silent = failed(replace(GOOD, targets=[target_findings("vllm-machete", verdict="silently wrong")]))["ranks_agree"]
    assert "vllm-machete at 2 gives wrong answers without an error: so" in silent.detail
    refused = failed(replace(GOOD, targets=[target_findings("vllm-marlin", verdict="refused")]))["ranks_agree"]
    assert refused.blocks
    assert "vllm-marlin at 2 refuses it: so" in refused.detail
    assert failed(replace(GOOD, targets=[]))["ranks_agree"].blocks


def test_a_family_of_kernels_needs_one_that_serves_and_none_that_errs() -> None:
    refused, serves = target_findings("vllm-marlin", "vllm", verdict="refused"), target_findings("vllm-cpu", "vllm")
    assert failed(replace(GOOD, targets=[refused, serves])) == {}
    assert failed(replace(GOOD, targets=[refused]))
    assert failed(replace(GOOD, targets=[refused, serves, target_findings("vllm-machete", "vllm", down_proj=0.5)]))


def test_heads_that_no_declared_engine_has_to_share_warn() -> None:
    assert not failed(replace(GOOD, targets=[target_findings(ANY_ENGINE, verdict="refused")]))["ranks_agree"].blocks
    assert failed(replace(GOOD, targets=[target_findings(ANY_ENGINE, down_proj=0.5)]))["ranks_agree"].blocks


def test_checks_without_what_they_compare_with_are_skipped_and_never_counted() -> None:
    models = {role: GOOD.models[role] for role in (MERGED, QUANTIZED)}
    bare = replace(GOOD, models=models, samples=[], structure=replace(GOOD.structure, padding=PaddingFindings()))
    reports = judge(bare, Limits(max_mean_kl=0.05, max_activation=1))
    skipped = {report.name: report.detail for report in concerning(reports) if report.skipped}
    assert skipped.keys() == {"padding_is_silent", "merged_not_worse", "sample_texts", "serves", "benchmark_tasks"}
    assert skipped["merged_not_worse"] == "No base was given to compare the merged model with."
    assert not any(report.passed or report.blocks for report in reports if report.skipped)
    assert verdict(reports) == (
        "failed: kl_divergence, with warnings: float16_range;"
        " skipped: padding_is_silent, merged_not_worse, sample_texts, serves, benchmark_tasks"
    )
    assert verdict(judge(bare, Limits())).startswith("passed: 14 of 14 checks that ran; skipped: padding_is_silent, ")


def test_added_channels_are_checked_without_the_padded_checkpoint() -> None:
    models = {role: GOOD.models[role] for role in (MERGED, QUANTIZED)}
    (report,) = (each for each in judge(replace(GOOD, models=models), Limits()) if each.name == "padding_is_silent")
    assert report.outcome == "passed"


def test_rounding_keeps_structure_and_names_what_is_not_finite() -> None:
    assert rounded({"a": [0.123456789, 3, "x", None, True], "b": float("inf")}) == {
        "a": [0.123457, 3, "x", None, True],
        "b": "inf",
    }
