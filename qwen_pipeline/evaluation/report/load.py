"""Read a finished validation back, from nothing but what its content digest covers.

No digest covers ``result`` in a manifest. What decides a release therefore comes from ``report.json``, whose SHA-256 is
part of the content digest, and the manifest must agree with it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from qwen_pipeline.checkpoint.files import parse_json
from qwen_pipeline.checkpoint.manifest import FileDigest, Manifest
from qwen_pipeline.checkpoint.store.lineage import Step
from qwen_pipeline.errors import CheckpointRefused, listed
from qwen_pipeline.evaluation.behaviour.checks import BEHAVIOUR_CHECKS, MINIMUM_BEHAVIOUR_CHECKS
from qwen_pipeline.evaluation.checks import AGREEMENT, CHECKS, MERGED_NOT_WORSE, PADDING, SAMPLES
from qwen_pipeline.evaluation.figures import ModelFigures
from qwen_pipeline.evaluation.head_checks import DRAFTS, MINIMUM_HEAD_CHECKS, inapplicable
from qwen_pipeline.evaluation.report.model_card import Widened
from qwen_pipeline.evaluation.report.rejudge import ReportedFindings, contradictions
from qwen_pipeline.evaluation.serving.findings import SERVED
from qwen_pipeline.evaluation.tasks.plan import TASKS
from qwen_pipeline.reports import CheckReport, load_reports

REPORT_JSON = "report.json"
RELEASED_JSON = f"validation/{REPORT_JSON}"
"""The report in a release, which contains its validation."""
OPTIONAL = frozenset(check.name for check in (SERVED, TASKS, MERGED_NOT_WORSE, SAMPLES, DRAFTS, *BEHAVIOUR_CHECKS))
"""Checks that a configuration may leave out; others are left out of models that they do not concern."""
MINIMUM = frozenset(check.name for check in (AGREEMENT, DRAFTS, *MINIMUM_HEAD_CHECKS, *MINIMUM_BEHAVIOUR_CHECKS))
"""Checks whose limit is a minimum. Every other limit is a maximum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationReport:
    """The contents of ``report.json`` that decide a release or enter its card.

    Attributes:
        candidate: Content digest of the quantized checkpoint.
        text: Digest of the held-out text.
        checks: One report for each promised check.
        findings: The findings that the checks are about.
        padding: Every size field that padding or a repair widened.
        lineage: The steps that made the reference.
    """

    candidate: str
    text: str
    checks: list[CheckReport]
    findings: ReportedFindings
    padding: list[Widened]
    lineage: list[Step]

    @property
    def blocking(self) -> list[CheckReport]:
        """The checks that prevent a release: blocking ones that failed, and required ones that were skipped."""
        silent = self.findings.structure.padding
        optional = OPTIONAL | inapplicable(self.findings.task)
        optional |= frozenset() if self.padding or silent.channels or silent.twins else {PADDING.name}
        return [check for check in self.checks if check.blocks or (check.skipped and check.name not in optional)]

    @property
    def obstacles(self) -> list[str]:
        """The reasons not to publish, one for each of the :attr:`blocking` checks."""
        return [f"{check.name}{' was skipped' if check.skipped else ''}: {check.detail}" for check in self.blocking]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedModels:
    models: dict[str, ModelFigures]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedReport:
    """The figures in the validation report of a release; an earlier version may have had other checks.

    Attributes:
        candidate: Content digest of the quantized checkpoint.
        text: Digest of the held-out text.
    """

    candidate: str
    text: str
    findings: ReleasedModels


_Report = TypeVar("_Report")
_REPORT, _RELEASED = TypeAdapter(ValidationReport), TypeAdapter(ReleasedReport)


def load_validation(root: Path, manifest: Manifest) -> ValidationReport:
    """Read the report of a finished validation.

    Raises:
        CheckpointRefused: The report is missing, is not the file that the manifest names, disagrees with the rest of
            the manifest, has a value of an unexpected type, or contradicts itself.
    """
    data = _read_report(root, REPORT_JSON, manifest)
    result, report = _parse(root, data, _REPORT)
    if _text(result) != _text(manifest.result):
        raise _damaged(root, f"its manifest states another result than its {REPORT_JSON}")
    _require_candidate(root, manifest, "candidate", report.candidate)
    checks = load_reports(result, source=str(root))
    if faults := _faults(checks) or contradictions(checks, report.findings, manifest.derivation.spec):
        raise _damaged(root, listed(faults))
    return replace(report, checks=checks)


def load_release(root: Path, manifest: Manifest) -> ReleasedReport:
    """Read the figures of a release from the validation report that it contains.

    Raises:
        CheckpointRefused: The report is missing, is not the file that the manifest names, has a value of an unexpected
            type, or is of another checkpoint than the manifest states.
    """
    _, report = _parse(root, _read_report(root, RELEASED_JSON, manifest), _RELEASED)
    _require_candidate(root, manifest, "quantized", report.candidate)
    return report


def _read_report(root: Path, name: str, manifest: Manifest) -> bytes:
    file, stated = root / name, manifest.contents.files.get(name)
    if not isinstance(stated, FileDigest):
        raise _damaged(root, f"its manifest has no SHA-256 of a {name}")
    if not file.is_file():
        raise _damaged(root, f"{name} is missing")
    data = file.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != stated.sha256:
        raise _damaged(root, f"{name} has the SHA-256 {found}, its manifest states {stated.sha256}")
    return data


def _parse(root: Path, data: bytes, kind: TypeAdapter[_Report]) -> tuple[dict[str, Any], _Report]:
    try:
        return parse_json(data), kind.validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(root, f"{REPORT_JSON}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except ValueError as error:
        raise _damaged(root, f"{REPORT_JSON} is not JSON ({error})") from error


def _require_candidate(root: Path, manifest: Manifest, role: str, candidate: str) -> None:
    if (stated := manifest.derivation.inputs.get(role)) != candidate:
        raise _damaged(root, f"its manifest states the {role} {stated}, its {REPORT_JSON} {candidate}")


def _faults(reports: Sequence[CheckReport]) -> list[str]:
    """Return the faults of a list of reports: each promised check must be there once, and be consistent."""
    names, promised = Counter(report.name for report in reports), {check.name for check in CHECKS}
    return [
        *(f"there is no report on {name}" for name in sorted(promised - names.keys())),
        *(f"{name} is no check of a validation" for name in sorted(names.keys() - promised)),
        *(f"there are {count} reports on {name}" for name, count in names.items() if count > 1),
        *(fault for report in reports if (fault := _contradiction(report))),
    ]


def _contradiction(report: CheckReport) -> str | None:
    if report.skipped and report.passed:
        return f"{report.name} is skipped and passed at once"
    if not report.passed or report.limit is None:
        return None
    if report.measured is None:
        return f"{report.name} is passed without a measured value, but has the limit {report.limit}"
    measured, limit = _number(report.measured), _number(report.limit)
    if measured is None or limit is None:
        return f"{report.name} compares {report.measured!r} with {report.limit!r}, expected two numbers"
    if measured >= limit if report.name in MINIMUM else measured <= limit:
        return None
    return f"{report.name} is passed, but {report.measured} is beyond its limit {report.limit}"


def _number(value: float | str) -> float | None:
    """Return a figure as a number; JSON has the ones that are not finite as text."""
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _text(value: Mapping[str, Any]) -> str:
    """Return JSON in which ``1``, ``1.0`` and ``true`` differ, unlike in a comparison of the values."""
    return json.dumps(value, sort_keys=True)


def _damaged(root: Path, why: str) -> CheckpointRefused:
    return CheckpointRefused(f"{root} is damaged: {why}.", remedy=f"Delete {root} and validate again.")
