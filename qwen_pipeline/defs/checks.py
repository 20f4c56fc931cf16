"""What a stage promised to check, and what it found, in Dagster's terms.

The checks run inside the step that makes the asset: the stage has the bytes in hand, and a blocking failure ends the
step, so that nothing downstream starts.
"""

import warnings
from collections.abc import Sequence

import dagster as dg

from qwen_pipeline.defs.partitions import FINE_TUNES
from qwen_pipeline.reports import CheckReport, CheckSpec


def asset_check_specs(
    asset: str, specs: Sequence[CheckSpec], partitions: dg.PartitionsDefinition = FINE_TUNES
) -> list[dg.AssetCheckSpec]:
    """Declare the checks of a partitioned asset.

    Without ``partitions_def`` Dagster forgets which partition failed; it still calls that parameter a preview.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.PreviewWarning)
        return [
            dg.AssetCheckSpec(
                spec.name, asset=asset, description=spec.description, blocking=spec.blocking, partitions_def=partitions
            )
            for spec in specs
        ]


def asset_check_result(report: CheckReport, partition: str) -> dg.AssetCheckResult:
    """Return the result for Dagster, which has no skipped checks: they warn, so that nothing is stopped."""
    figures = {"measured": report.measured, "limit": report.limit, "partition": partition}
    return dg.AssetCheckResult(
        passed=report.passed,
        check_name=report.name,
        severity=dg.AssetCheckSeverity("WARN" if report.skipped else report.severity),
        description=f"Skipped: {report.detail}" if report.skipped else report.detail,
        metadata={key: value for key, value in figures.items() if value is not None},
    )
