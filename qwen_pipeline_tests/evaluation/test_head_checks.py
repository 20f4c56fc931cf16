"""The checks of other heads: each limit decides its own check, and checks of other kinds of models are skipped."""

from dataclasses import replace

import pytest

from qwen_pipeline.evaluation.checks import CHECKS, judge, verdict
from qwen_pipeline.evaluation.figures import HeadFigures, ModelFigures
from qwen_pipeline.evaluation.findings import BASE, MERGED, PADDED, QUANTIZED, Findings
from qwen_pipeline.evaluation.head_checks import HEAD_CHECKS, OF_LANGUAGE, concerning, inapplicable
from qwen_pipeline.evaluation.heads import HeadTask
from qwen_pipeline.evaluation.limits import Limits
from qwen_pipeline.evaluation.report.html import render_page
from qwen_pipeline.evaluation.report.markdown import HEAD_COLUMNS, quality_table
from qwen_pipeline.evaluation.report.usage import loading_code
from qwen_pipeline.evaluation.serving.findings import ServingFindings
from qwen_pipeline.reports import CheckReport
from qwen_pipeline_tests.evaluation.example_findings import GOOD, SMALL_PEAK

CLASSIFIER = HeadTask(kind="sequence", labels=3)
REWARDS = HeadTask(kind="sequence", labels=1)
TOKENS = HeadTask(kind="token", labels=3)
EMBEDDER = HeadTask(kind="embedding", pooling=("lasttoken",))
CLOSE = {
    CLASSIFIER: HeadFigures(outputs=64, error=0.2, max_error=1.0, agreement=0.95),
    REWARDS: HeadFigures(outputs=64, error=0.2, max_error=1.0, order=0.95),
    TOKENS: HeadFigures(outputs=640, error=0.2, max_error=1.0, agreement=0.95),
    EMBEDDER: HeadFigures(outputs=64, error=0.2, max_error=1.0, cosine=0.97, min_cosine=0.9),
}
ROUNDED = HeadFigures(outputs=64, error=1e-6, max_error=1e-5, agreement=1, order=1, cosine=1, min_cosine=1)


def findings_of(task: HeadTask, **changes: ModelFigures) -> Findings:
    models = {
        BASE: ModelFigures(),
        MERGED: ModelFigures(tokens=640),
        PADDED: ModelFigures(tokens=640, head=ROUNDED),
        QUANTIZED: ModelFigures(tokens=640, head=CLOSE[task], peaks=(SMALL_PEAK,)),
    }
    return replace(GOOD, task=task, models=models | changes, samples=[], nbytes=dict.fromkeys(models, 1000))


def judged(findings: Findings, limits: Limits | None = None) -> dict[str, CheckReport]:
    reports = judge(findings, limits or Limits())
    assert [report.name for report in reports] == [check.name for check in CHECKS]
    return {report.name: report for report in reports}


@pytest.mark.parametrize(
    ("task", "ran"),
    [
        (CLASSIFIER, {"head_logits", "label_agreement"}),
        (REWARDS, {"head_logits", "reward_order"}),
        (TOKENS, {"head_logits", "label_agreement"}),
        (EMBEDDER, {"embedding_cosine"}),
    ],
)
def test_a_good_model_passes_the_checks_that_concern_it(task: HeadTask, ran: set[str]) -> None:
    reports = judged(findings_of(task))
    ours = {check.name for check in HEAD_CHECKS}
    assert {name for name in ours if reports[name].passed} == ran
    assert (
        {name for name, report in reports.items() if report.skipped} - {"serves"}
        == (ours - ran) | OF_LANGUAGE
        == inapplicable(task)
    )
    assert "validation.serve.engine" in reports["serves"].detail
    number = 6 + len(ran)
    assert verdict(list(reports.values())) == f"passed: {number} of {number} checks that ran; skipped: serves"


def test_a_language_model_skips_them_and_its_verdict_does_not_name_them() -> None:
    reports = judge(GOOD, Limits())
    assert {report.name for report in reports if report.skipped} == {check.name for check in HEAD_CHECKS} | {
        "draft_acceptance",
        "serves",
        "benchmark_tasks",
    }
    assert next(report.detail for report in reports if report.name == "head_logits") == "This is a language model."
    assert [report.name for report in concerning(reports) if report.skipped] == ["serves", "benchmark_tasks"]


@pytest.mark.parametrize(
    ("task", "limits", "name"),
    [
        (CLASSIFIER, Limits(max_head_error=0.1), "head_logits"),
        (CLASSIFIER, Limits(min_label_agreement=0.96), "label_agreement"),
        (TOKENS, Limits(min_label_agreement=0.96), "label_agreement"),
        (REWARDS, Limits(min_reward_order=0.96), "reward_order"),
        (EMBEDDER, Limits(min_embedding_cosine=0.98), "embedding_cosine"),
        (EMBEDDER, Limits(max_padding_error=1e-9), "padding_is_silent"),
    ],
)
def test_each_limit_decides_one_check(task: HeadTask, limits: Limits, name: str) -> None:
    reports = judged(findings_of(task), limits)
    assert [report.name for report in reports.values() if report.blocks] == [name]


def test_a_model_that_did_not_load_fails_what_needs_it() -> None:
    reports = judged(findings_of(CLASSIFIER, **{QUANTIZED: ModelFigures(fault="ValueError: no")}))
    assert {name for name, report in reports.items() if report.outcome == "failed"} == {
        "loads_in_transformers",
        "head_logits",
        "label_agreement",
    }
    assert "did not load: quantized" in reports["head_logits"].detail


@pytest.mark.parametrize("task", CLOSE)
def test_outputs_that_an_engine_computed_have_the_same_limits(task: HeadTask) -> None:
    served = ServingFindings(role="quantized", degree=2, engine="vllm", ready=True, head=CLOSE[task])
    report = judged(replace(findings_of(task), served=[served]))["serves"]
    assert report.passed
    assert f"vllm serves quantized on 2 ranks: {CLOSE[task].outputs} outputs" in report.detail
    strict = Limits(max_head_error=0.1, min_embedding_cosine=0.98)
    report = judged(replace(findings_of(task), served=[served]), strict)["serves"]
    assert (report.blocks, report.measured) == (True, 0.97 if task is EMBEDDER else 0.2)
    assert " is 0.97, not 0.98" in report.detail if task is EMBEDDER else "head_logits is 0.2, not 0.1" in report.detail


def test_an_engine_that_computed_nothing_never_passes() -> None:
    served = ServingFindings(role="quantized", degree=1, engine="vllm", ready=True)
    outcomes = {
        "failed": [served],
        "failed, too": [replace(served, fault="ValueError: no")],
        "skipped": [replace(served, fault="x", lacking="the engine has no kernel k")],
        "skipped, too": [replace(served, uncompared="the engine also computes what follows")],
        "warning": [replace(served, lacking="no kernel"), replace(served, role="merged", head=CLOSE[EMBEDDER])],
    }
    for outcome, findings in outcomes.items():
        report = judged(replace(findings_of(EMBEDDER), served=findings))["serves"]
        assert report.outcome == outcome.partition(",")[0], report.detail
    page = render_page(replace(findings_of(EMBEDDER), served=outcomes["warning"]), [], plots={}, lineage=[], method="")
    assert "64 outputs, compared with the merged model" in page


def test_nan_never_passes() -> None:
    nan = float("nan")
    lost = HeadFigures(outputs=1, error=nan, max_error=nan, agreement=nan, order=nan, cosine=nan, min_cosine=nan)
    for task in CLOSE:
        reports = judged(findings_of(task, **{QUANTIZED: ModelFigures(head=lost, peaks=(SMALL_PEAK,))}))
        assert not any(reports[check.name].passed for check in HEAD_CHECKS)
        served = ServingFindings(role="quantized", degree=1, engine="vllm", ready=True, head=lost)
        assert judged(replace(findings_of(task), served=[served]))["serves"].blocks


def test_reports_show_the_figures_of_heads() -> None:
    findings = findings_of(REWARDS)
    table = quality_table(findings.models, findings.nbytes)
    assert table.splitlines()[0] == f"| {' | '.join(HEAD_COLUMNS)} |"
    assert "| quantized | 0.0 | 64 | 0.2 |  | 0.95 |  |" in table
    page = render_page(findings, judge(findings, Limits()), plots={}, lineage=[], method="")
    assert "Order of rewards" in page
    assert "Perplexity, quantized" not in page
    assert "AutoModelForSequenceClassification.from_pretrained" in loading_code("spam", CLASSIFIER)
    assert "pooling: lasttoken" in loading_code("search", EMBEDDER)


def test_shares_of_accepted_drafts_are_compared_with_their_limit_and_shown_beside_those_before() -> None:
    def found(share: float) -> CheckReport:
        models = {
            role: replace(model, draft_acceptance={MERGED: 0.8, QUANTIZED: share}.get(role))
            for role, model in GOOD.models.items()
        }
        reports = concerning(judge(replace(GOOD, models=models), Limits(min_draft_acceptance=0.5)))
        return next(report for report in reports if report.name == "draft_acceptance")

    good, bad = found(0.75), found(0.25)
    assert (good.outcome, good.measured, good.limit) == ("passed", 0.75, 0.5)
    assert "merged 80.0%" in good.detail
    assert (bad.outcome, bad.blocks) == ("warning", False)
    assert "train the draft head" in bad.detail
