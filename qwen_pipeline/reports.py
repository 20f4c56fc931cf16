"""Checks that a stage runs on its own output, and their outcomes: for manifests, Dagster and people."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from qwen_pipeline.errors import CheckpointRefused, listed

Severity = Literal["ERROR", "WARN"]
Outcome = Literal["passed", "failed", "warning", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckSpec:
    """A check that a stage reports on each run. A failure of a ``blocking`` check stops everything downstream."""

    name: str
    description: str
    blocking: bool = True

    def report(
        self,
        *,
        passed: bool,
        detail: str,
        measured: float | str | None = None,
        limit: float | str | None = None,
        severity: Severity = "ERROR",
    ) -> "CheckReport":
        """Return the outcome of this check. If the check is not blocking, a failure is only a warning."""
        return CheckReport(
            name=self.name,
            passed=passed,
            detail=detail,
            severity=severity if self.blocking else "WARN",
            measured=measured,
            limit=limit,
        )

    def skipped(self, detail: str) -> "CheckReport":
        """Return a report that this check did not run, with the reason. It neither blocks nor counts as passed."""
        severity: Severity = "ERROR" if self.blocking else "WARN"
        return CheckReport(name=self.name, passed=False, skipped=True, detail=detail, severity=severity)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """The outcome of one check.

    Attributes:
        passed: Whether the check ran and found no fault.
        skipped: Whether the check did not run.
        severity: Whether a failure blocks (ERROR) or only warns (WARN).
        measured: The value found, in the unit that ``detail`` names.
        limit: The limit that it is compared with, if there is one.
        detail: One sentence for a reader who does not know the check; after a failure it says what to do.
    """

    name: str
    passed: bool
    detail: str
    severity: Severity = "ERROR"
    measured: float | str | None = None
    limit: float | str | None = None
    skipped: bool = False

    @property
    def blocks(self) -> bool:
        """True if it failed with severity ERROR, which stops everything downstream."""
        return not self.passed and not self.skipped and self.severity == "ERROR"

    @property
    def outcome(self) -> Outcome:
        if self.skipped:
            return "skipped"
        return "passed" if self.passed else "failed" if self.severity == "ERROR" else "warning"

    @property
    def figures(self) -> tuple[str, str]:
        """The measured value and the limit as text. With a limit of zero, the value is a number of faults."""
        if self.limit == 0:
            return f"{shown(self.measured)} fault{'' if self.measured == 1 else 's'}", "none"
        return shown(self.measured), shown(self.limit)


def report_on_modules(check: CheckSpec, *, total: int, bad: Sequence[str], remedy: str) -> CheckReport:
    """Return the outcome of a check of ``total`` modules, of which those in ``bad`` fail it."""
    return CheckReport(
        name=check.name,
        passed=not bad,
        severity="ERROR" if check.blocking else "WARN",
        measured=float(len(bad)),
        limit=0.0,
        detail=f"Fails for {len(bad)} of {total} modules: {listed(bad)}. {remedy}"
        if bad
        else f"Holds for {total} modules.",
    )


def shown(value: float | str | None) -> str:
    """Return a number with four significant digits, a text unchanged, and an empty text for None."""
    return f"{value:.4g}" if isinstance(value, (int, float)) else value or ""


def dump_reports(reports: Sequence[CheckReport]) -> list[dict[str, Any]]:
    """Return reports as JSON values, as in ``Manifest.result["checks"]``."""
    return [asdict(report) for report in reports]


_REPORTS = TypeAdapter(list[CheckReport])


def load_reports(result: Mapping[str, Any], *, source: str = "A manifest") -> list[CheckReport]:
    """Return the reports of a manifest's ``result``; ``source`` is its name in an error message.

    Raises:
        CheckpointRefused: A report lacks a field, has an unknown one, or has a value of another type.
    """
    checks = result.get("checks", [])
    try:
        _REPORTS.validate_json(json.dumps(checks), strict=True)
        reports = [CheckReport(**check) for check in checks]
        for report in reports:
            _ = report.figures  # an integer may be too large for a float
    except (TypeError, OverflowError, ValidationError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        raise CheckpointRefused(
            f"{source} has damaged check reports: {'.'.join(map(str, ('checks', *first['loc'])))}: {first['msg']}.",
            remedy="Delete the directory and run its stage again; the result is the same.",
        ) from error
    return reports
