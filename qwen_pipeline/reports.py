"""What a stage checked about its own output, in one form for manifests, Dagster and people."""

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
    """A check that a stage promises to report on each run. ``blocking`` stops everything downstream when it fails."""

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
        """Return the outcome of this check; a check that does not block only ever warns."""
        return CheckReport(
            name=self.name,
            passed=passed,
            detail=detail,
            severity=severity if self.blocking else "WARN",
            measured=measured,
            limit=limit,
        )

    def skipped(self, detail: str) -> "CheckReport":
        """Return that this check did not run, and why: it neither blocks nor counts as passed."""
        severity: Severity = "ERROR" if self.blocking else "WARN"
        return CheckReport(name=self.name, passed=False, skipped=True, detail=detail, severity=severity)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """The outcome of one check.

    Attributes:
        passed: Whether it ran and found nothing wrong.
        skipped: Whether it did not run. A skipped check proves nothing, and stops nothing.
        severity: What a failure means; a failed WARN never blocks.
        measured: The value found, in the unit that ``detail`` names.
        limit: The value that decides, if there is one.
        detail: One sentence for a reader who does not know the check; on failure it says what to do.
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
        """Whether it failed in a way that stops everything downstream."""
        return not self.passed and not self.skipped and self.severity == "ERROR"

    @property
    def outcome(self) -> Outcome:
        if self.skipped:
            return "skipped"
        return "passed" if self.passed else "failed" if self.severity == "ERROR" else "warning"

    @property
    def figures(self) -> tuple[str, str]:
        """What was measured and the limit, for a reader; under a limit of zero, faults were counted."""
        if self.limit == 0:
            return f"{shown(self.measured)} fault{'' if self.measured == 1 else 's'}", "none"
        return shown(self.measured), shown(self.limit)


def report_on_modules(check: CheckSpec, *, total: int, bad: Sequence[str], remedy: str) -> CheckReport:
    """Report on a check that each of so many modules passes or fails by itself; ``bad`` are those that fail."""
    return CheckReport(
        name=check.name,
        passed=not bad,
        severity="ERROR" if check.blocking else "WARN",
        measured=float(len(bad)),
        limit=0.0,
        detail=f"Not so for {len(bad)} of {total} modules: {listed(bad)}. {remedy}"
        if bad
        else f"True for {total} modules.",
    )


def shown(value: float | str | None) -> str:
    """Return a figure with four significant digits, a text as it is, nothing for None."""
    return f"{value:.4g}" if isinstance(value, (int, float)) else value or ""


def dump_reports(reports: Sequence[CheckReport]) -> list[dict[str, Any]]:
    """Return reports as JSON values, the form they have in ``Manifest.result["checks"]``."""
    return [asdict(report) for report in reports]


_REPORTS = TypeAdapter(list[CheckReport])


def load_reports(result: Mapping[str, Any], *, source: str = "A manifest") -> list[CheckReport]:
    """Return the reports of a manifest's ``result``; ``source`` is its name in an error message.

    Raises:
        CheckpointRefused: A report lacks a field, has one too many, or has a value of another type.
    """
    checks = result.get("checks", [])
    try:
        _REPORTS.validate_json(json.dumps(checks), strict=True)
        return [CheckReport(**check) for check in checks]
    except (TypeError, ValidationError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        raise CheckpointRefused(
            f"{source} has damaged check reports: {'.'.join(map(str, ('checks', *first['loc'])))}: {first['msg']}.",
            remedy="Delete the directory and run its stage again; the result is the same.",
        ) from error
