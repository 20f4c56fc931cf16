"""Stored reports may not be milder than the findings beside them."""

import json
from dataclasses import asdict, replace
from math import inf
from typing import Any

import pytest
from pydantic import TypeAdapter

from qwen_pipeline.evaluation.checks import judge
from qwen_pipeline.evaluation.figures import ModelFigures
from qwen_pipeline.evaluation.findings import MERGED, QUANTIZED, Findings, rounded
from qwen_pipeline.evaluation.limits import Limits
from qwen_pipeline.evaluation.report.rejudge import ReportedFindings, contradictions
from qwen_pipeline.evaluation.serving.findings import FirstDivergence
from qwen_pipeline.evaluation.structure.weights import PaddingFindings
from qwen_pipeline.evaluation.tasks.plan import TaskPlan
from qwen_pipeline.reports import CheckReport, dump_reports, load_reports
from qwen_pipeline_tests.evaluation.example_findings import GOOD, HELD, SERVED

LIMITS = Limits(max_perplexity_ratio=1.2345678)
_FINDINGS = TypeAdapter(ReportedFindings)


def stored(
    findings: Findings, limits: Limits = LIMITS, tasks: TaskPlan | None = None
) -> tuple[list[CheckReport], ReportedFindings, dict[str, Any]]:
    """Return reports, findings and spec as they are read back from a report."""
    reports = load_reports({"checks": json.loads(json.dumps(rounded(dump_reports(judge(findings, limits, tasks)))))})
    spec = {"limits": asdict(limits), "tasks": tasks.to_json() if tasks else None}
    sized = replace(findings, nbytes=dict.fromkeys(findings.models, 1))
    return reports, _FINDINGS.validate_json(json.dumps(sized.to_json())), spec


def altered(reports: list[CheckReport], name: str, **changes: Any) -> list[CheckReport]:
    return [replace(report, **changes) if report.name == name else report for report in reports]


def with_quantized(**changes: Any) -> Findings:
    return replace(GOOD, models={**GOOD.models, QUANTIZED: replace(GOOD.models[QUANTIZED], **changes)})


UNLOADED = with_quantized(fault="OSError: no", perplexity=None, divergence=None, peaks=(), answers=())
WRONG = replace(SERVED, partings=[FirstDivergence(position=1, gap=inf)], texts=SERVED.texts[:1])
AUDIBLE = PaddingFindings(channels=2, audible=["loud"])


@pytest.mark.parametrize(
    "findings",
    [
        GOOD,
        UNLOADED,
        with_quantized(unplaced="experts"),
        replace(GOOD, structure=replace(GOOD.structure, problems=["lm_head is missing"])),
        replace(GOOD, structure=replace(GOOD.structure, padding=AUDIBLE)),
        replace(GOOD, parallel=None, targets=[]),
        replace(GOOD, served=[SERVED]),
        replace(GOOD, served=[WRONG]),
        replace(GOOD, served=[replace(SERVED, lacking="no GPU")]),
        replace(GOOD, samples=[], models={role: GOOD.models[role] for role in (MERGED, QUANTIZED)}),
    ],
)
def test_reports_agree_with_their_own_findings(findings: Findings) -> None:
    assert contradictions(*stored(findings)) == []


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("max_drop", [0.005, 0.03])
def test_task_scores_are_judged_by_the_stored_plan(blocking: bool, max_drop: float, tmp_path: Any) -> None:
    plan = TaskPlan(python=tmp_path, versions={}, tasks=["arc"], max_drop=max_drop, blocking=blocking)
    reports, findings, spec = stored(replace(GOOD, tasks=[HELD]), tasks=plan)
    assert contradictions(reports, findings, spec) == []
    milder = altered(reports, "benchmark_tasks", passed=True, severity="ERROR")
    assert bool(contradictions(milder, findings, spec)) == (max_drop < 0.01 and blocking)


@pytest.mark.parametrize(
    ("findings", "name", "changes", "words"),
    [
        (UNLOADED, "loads_in_transformers", {"severity": "WARN"}, "is warning, but its findings fail it"),
        (UNLOADED, "perplexity_ratio", {"passed": True}, "is passed, but its findings fail it"),
        (replace(GOOD, targets=[]), "ranks_agree", {"severity": "WARN"}, "is warning, but its findings fail it"),
        (GOOD, "kl_divergence", {"passed": False, "severity": "WARN"}, "is a warning, but a failure of it blocks"),
        (GOOD, "kl_divergence", {"limit": 9.0}, "has the limit 9.0, but its spec gives 0.3"),
        (GOOD, "kl_divergence", {"limit": None}, "has the limit None, but its spec gives 0.3"),
        (GOOD, "serves", {"passed": True, "skipped": False}, "is passed, but its findings say that it did not run"),
        (replace(GOOD, served=[WRONG]), "serves", {"skipped": True}, "is skipped, but its findings fail it"),
    ],
)
def test_a_report_milder_than_its_findings_is_named(
    findings: Findings, name: str, changes: dict[str, Any], words: str
) -> None:
    reports, kept, spec = stored(findings)
    (found,) = contradictions(altered(reports, name, **changes), kept, spec)
    assert found.startswith(f"{name} {words}")


def test_a_value_that_crosses_its_limit_by_rounding_is_no_contradiction() -> None:
    models = {**GOOD.models, MERGED: ModelFigures(perplexity=3.0)}
    at_limit = replace(GOOD, models={**models, QUANTIZED: replace(GOOD.models[QUANTIZED], perplexity=3.70370339)})
    reports, findings, spec = stored(at_limit)
    assert {report.name: report.outcome for report in reports}["perplexity_ratio"] == "passed"
    assert contradictions(reports, findings, spec) == []


@pytest.mark.parametrize("spec", [{}, {"limits": []}, {"limits": {"max_mean_kl": "low"}}, {"limits": {}, "tasks": {}}])
def test_a_damaged_spec_is_named(spec: dict[str, Any]) -> None:
    reports, findings, _ = stored(GOOD)
    (found,) = contradictions(reports, findings, spec)
    assert found.startswith("its spec is damaged: ")


def test_findings_without_a_model_are_named() -> None:
    reports, findings, spec = stored(GOOD)
    bare = replace(findings, models={}, nbytes={})
    assert contradictions(reports, bare, spec) == [
        "the findings have no merged model",
        "the findings have no quantized model",
    ]
