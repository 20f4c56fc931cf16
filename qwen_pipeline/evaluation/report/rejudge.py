"""Compare the stored reports of a validation with the verdict on its stored findings.

Findings are stored with six significant digits, so that a measured value may cross its limit by rounding alone. A
report may be harsher than its findings, never milder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import Field, TypeAdapter, ValidationError

from qwen_pipeline.evaluation.behaviour.findings import Behaviour
from qwen_pipeline.evaluation.checks import judge
from qwen_pipeline.evaluation.figures import ModelFigures
from qwen_pipeline.evaluation.findings import MERGED, QUANTIZED, Findings, rounded
from qwen_pipeline.evaluation.heads import HeadTask
from qwen_pipeline.evaluation.limits import Limits
from qwen_pipeline.evaluation.samples import Sample
from qwen_pipeline.evaluation.serving.findings import ServingFindings
from qwen_pipeline.evaluation.tasks.plan import Score, TaskPlan
from qwen_pipeline.evaluation.tensor_parallel.findings import TargetFindings
from qwen_pipeline.qwen.tensor_parallel.feasibility import DegreeFeasibility
from qwen_pipeline.reports import CheckReport

ROUNDING = 1e-4
"""Relative distance from its limit below which a value computed from rounded ones decides nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedPadding:
    channels: int
    twins: int
    audible: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedStructure:
    """The stored findings about the structure. The module of their own class imports torch."""

    problems: list[str]
    padding: ReportedPadding
    errors: list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedFindings:
    """The stored :class:`~qwen_pipeline.evaluation.findings.Findings`."""

    structure: ReportedStructure
    models: dict[str, ModelFigures]
    nbytes: dict[str, Annotated[int, Field(ge=0, lt=2**63)]]
    samples: list[Sample]
    parallel: DegreeFeasibility | None
    targets: list[TargetFindings]
    served: list[ServingFindings]
    tasks: list[Score]
    tasks_fault: str | None
    task: HeadTask
    behaviour: Behaviour

    @property
    def faults(self) -> list[str]:
        """The figures that every validation has and this one lacks."""
        return [
            *(f"the findings have no {role} model" for role in (MERGED, QUANTIZED) if role not in self.models),
            *(f"the findings have no size of the {role} model" for role in self.models.keys() - self.nbytes.keys()),
        ]

    def judge(self, limits: Limits, tasks: TaskPlan | None) -> list[CheckReport]:
        """Return the reports that these findings lead to."""
        findings = Findings(
            structure=cast("Any", self.structure),
            models=self.models,
            nbytes=self.nbytes,
            samples=self.samples,
            parallel=self.parallel,
            targets=self.targets,
            served=self.served,
            tasks=self.tasks,
            tasks_fault=self.tasks_fault,
            task=self.task,
            behaviour=self.behaviour,
        )
        return judge(findings, limits, tasks)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """The part of a validation's spec that decides its verdict."""

    limits: Limits
    tasks: dict[str, Any] | None = None


_PLAN, _TASKS = TypeAdapter(_Plan), TypeAdapter(TaskPlan)


def contradictions(reports: Sequence[CheckReport], findings: ReportedFindings, spec: Mapping[str, Any]) -> list[str]:
    """Return the reports that are milder than the findings, or apply another limit than the spec.

    Args:
        reports: One report for each check.
        findings: The findings stored beside them.
        spec: The spec of the validation's derivation.
    """
    if faults := findings.faults:
        return faults
    try:
        plan = _PLAN.validate_python(spec)
        tasks = None if plan.tasks is None else _TASKS.validate_python({**plan.tasks, "python": Path()})
    except ValidationError as error:
        first = error.errors()[0]
        return [f"its spec is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}"]
    judged = {report.name: report for report in findings.judge(plan.limits, tasks)}
    return [fault for report in reports if (fault := _contradiction(report, judged[report.name]))]


def _contradiction(stored: CheckReport, judged: CheckReport) -> str | None:
    if judged.skipped and not stored.skipped:
        return f"{stored.name} is {stored.outcome}, but its findings say that it did not run"
    if judged.blocks and not stored.blocks and not _is_borderline(judged):
        return f"{stored.name} is {stored.outcome}, but its findings fail it: {judged.detail}"
    if stored.outcome == "warning" and judged.severity == "ERROR":
        return f"{stored.name} is a warning, but a failure of it blocks"
    if not (stored.skipped or judged.skipped) and stored.limit != (limit := rounded(judged.limit)):
        return f"{stored.name} has the limit {stored.limit}, but its spec gives {limit}"
    return None


def _is_borderline(report: CheckReport) -> bool:
    """Return whether a report's value equals its limit but for rounding; counts are exact."""
    match report.measured, report.limit:
        case float(measured), float(limit):
            return isclose(measured, limit, rel_tol=ROUNDING)
        case _:
            return False
