"""Benchmark tasks of lm-eval: the plan, the scores of the merged and the quantized model, and their check."""

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
    description="In the configured lm-eval tasks, the quantized model scores no more than the allowed drop below the"
    " merged one, and no score is below its minimum.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskPlan:
    """The tasks to run, and the limits of their scores.

    Attributes:
        python: The interpreter of an environment with lm-eval.
        versions: Versions of the packages that affect the scores.
        tasks: Names of tasks, groups or tags.
        include: A directory with custom task files.
        limit: Number of examples of each task; None for all.
        max_drop: Allowed difference of the quantized model's score from the merged model's, in the unit of the metric.
        minimum: ``task/metric`` -> the minimum score of the quantized model (the maximum if lower is better).
        blocking: Whether a failure stops the release; if not, it is a warning.
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
        """Return the settings that affect the scores and the verdict, for the identity of a validation."""
        fields = asdict(self)
        del fields["python"]
        return fields | {"include": None if self.include is None else str(self.include)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One metric of one task.

    Attributes:
        name: ``task/metric``, as in ``arc_easy/acc``; a filter other than lm-eval's ``none`` follows a comma.
        more_is_better: Whether a higher value is better.
        merged: The merged model's score.
        quantized: The quantized model's score.
        stderr: Standard error of the quantized model's score, if lm-eval computes one.
    """

    name: str
    more_is_better: bool
    merged: float
    quantized: float
    stderr: float | None = None

    @property
    def drop(self) -> float:
        """The amount by which the quantized model is worse."""
        return self.merged - self.quantized if self.more_is_better else self.quantized - self.merged


def scores(results: Mapping[str, Mapping[str, Any]]) -> list[Score]:
    """Pair the worker's results of ``merged`` and ``quantized``."""
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
    """Report on :data:`TASKS` with the scores, or with the reason why there are none; skipped without a plan."""
    if plan is None:
        return TASKS.skipped("No tasks are configured (validation.lm_eval.tasks).")
    if not found:
        reason = fault or "a model did not load."
        return TASKS.report(passed=False, severity=_severity(plan), detail=f"No scores: {reason}")
    if unknown := sorted(plan.minimum.keys() - {score.name for score in found}):
        known = ", ".join(score.name for score in found)
        return TASKS.report(
            passed=False,
            severity=_severity(plan),
            detail=f"A minimum is set for {listed(unknown)}, but the scores are {known}.",
        )
    faults = [fault for score in found for fault in _faults(score, plan)]
    worst = max(score.drop for score in found)
    detail = listed(faults) if faults else ", ".join(map(_describe, found))
    return TASKS.report(
        passed=not faults, severity=_severity(plan), measured=worst, limit=plan.max_drop, detail=f"{detail}."
    )


def _faults(score: Score, plan: TaskPlan) -> list[str]:
    faults = [] if score.drop <= plan.max_drop else [f"{_describe(score)}, a drop of {shown(score.drop)}"]
    if (bound := plan.minimum.get(score.name)) is not None:
        reached = score.quantized >= bound if score.more_is_better else score.quantized <= bound
        required = f"at {'least' if score.more_is_better else 'most'} {shown(bound)}"
        faults += [] if reached else [f"{score.name} is {shown(score.quantized)}, expected {required}"]
    return faults


def _describe(score: Score) -> str:
    return f"{score.name} {shown(score.merged)} merged, {shown(score.quantized)} quantized"


def _severity(plan: TaskPlan) -> Severity:
    return "ERROR" if plan.blocking else "WARN"


_RESULTS = TypeAdapter(dict[str, dict[str, dict[str, Any]]])


def load_results(value: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    return _RESULTS.validate_python(value)
