"""Benchmark tasks of lm-eval: which to run, what the merged and the quantized model score, and whether that will do."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from qwen_pipeline.errors import listed
from qwen_pipeline.reports import CheckReport, CheckSpec, Severity, shown

RUN_TASKS = "qwen_pipeline.evaluation.tasks.worker:run_tasks"

TASKS = CheckSpec(
    name="benchmark_tasks",
    description="In lm-eval's tasks, where some are configured, the quantized model loses no more against the merged"
    " one than allowed, and no score is below its minimum.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskPlan:
    """Which tasks to run and what is asked of their scores.

    Attributes:
        python: The interpreter of an environment that has lm-eval.
        versions: Of the packages that compute.
        tasks: Names of tasks, groups or tags.
        include: A directory of task files of one's own.
        limit: Examples of each task; None takes all.
        max_drop: How far below the merged model's the quantized model's score may be, in the metric's own unit.
        minimum: ``task/metric`` -> the lowest score of the quantized model (the highest, where less is better).
        blocking: Whether a failure stops the release, or warns.
    """

    python: Path
    versions: Mapping[str, str]
    tasks: Sequence[str]
    include: Path | None = None
    limit: int | None = None
    max_drop: float = 0.03
    minimum: Mapping[str, float] = field(default_factory=dict[str, float])
    blocking: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return what decides scores and verdict, for the identity of a validation."""
        asked = asdict(self)
        del asked["python"]
        return asked | {"include": None if self.include is None else str(self.include)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One metric of one task.

    Attributes:
        name: ``task/metric``, as in ``arc_easy/acc``; a filter other than lm-eval's ``none`` follows a comma.
        more_is_better: Which way is up.
        merged: The merged model's score.
        quantized: The quantized model's.
        stderr: Standard error of the latter, where lm-eval gives one.
    """

    name: str
    more_is_better: bool
    merged: float
    quantized: float
    stderr: float | None = None

    @property
    def drop(self) -> float:
        """How much worse the quantized model is."""
        return self.merged - self.quantized if self.more_is_better else self.quantized - self.merged


def scores(results: Mapping[str, Mapping[str, Any]]) -> list[Score]:
    """Pair what the worker found of ``merged`` and ``quantized``."""
    merged, quantized = results["merged"], results["quantized"]
    return [
        Score(
            name=name,
            more_is_better=found["more_is_better"],
            merged=merged[name]["value"],
            quantized=found["value"],
            stderr=found["stderr"],
        )
        for name, found in quantized.items()
    ]


def tasks_report(plan: "TaskPlan | None", found: Sequence[Score], *, fault: str | None = None) -> CheckReport:
    """Judge the scores, or say why there are none; without a plan nothing was asked."""
    if plan is None:
        return TASKS.skipped("No tasks are configured (validation.lm_eval.tasks).")
    if not found:
        why = fault or "a model does not load."
        return TASKS.report(passed=False, severity=_severity(plan), detail=f"No scores: {why}")
    if unknown := sorted(plan.minimum.keys() - {score.name for score in found}):
        known = ", ".join(score.name for score in found)
        return TASKS.report(
            passed=False,
            severity=_severity(plan),
            detail=f"There is a minimum for {listed(unknown)}, but the scores are {known}.",
        )
    faults = [fault for score in found for fault in _faults(score, plan)]
    worst = max(score.drop for score in found)
    detail = listed(faults) if faults else ", ".join(map(_said, found))
    return TASKS.report(
        passed=not faults, severity=_severity(plan), measured=worst, limit=plan.max_drop, detail=f"{detail}."
    )


def _faults(score: Score, plan: TaskPlan) -> list[str]:
    faults = [] if score.drop <= plan.max_drop else [f"{_said(score)}, a loss of {shown(score.drop)}"]
    if (bound := plan.minimum.get(score.name)) is not None:
        reached = score.quantized >= bound if score.more_is_better else score.quantized <= bound
        faults += [] if reached else [f"{score.name} is {shown(score.quantized)}, wanted {shown(bound)}"]
    return faults


def _said(score: Score) -> str:
    return f"{score.name} {shown(score.merged)} merged, {shown(score.quantized)} quantized"


def _severity(plan: TaskPlan) -> Severity:
    return "ERROR" if plan.blocking else "WARN"


_RESULTS = TypeAdapter(dict[str, dict[str, dict[str, Any]]])


def load_results(value: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    return _RESULTS.validate_python(value)
