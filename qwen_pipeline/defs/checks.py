"""The checks of a stage as Dagster's asset checks.

They run inside the step that materializes the asset, where the data is already in use, and a blocking failure fails the
step, so that nothing downstream starts.
"""

import warnings
from collections.abc import Sequence

import dagster as dg

from qwen_pipeline.defs.metadata import significant
from qwen_pipeline.defs.partitions import FINE_TUNES
from qwen_pipeline.reports import CheckReport, CheckSpec


def asset_check_specs(
    asset: str, specs: Sequence[CheckSpec], partitions: dg.PartitionsDefinition = FINE_TUNES
) -> list[dg.AssetCheckSpec]:
    """Declare the checks of a partitioned asset.

    Without ``partitions_def``, Dagster does not store which partition failed. The parameter is still in preview.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.PreviewWarning)
        return [
            dg.AssetCheckSpec(
                spec.name, asset=asset, description=spec.description, blocking=spec.blocking, partitions_def=partitions
            )
            for spec in specs
        ]


def asset_check_result(report: CheckReport, partition: str, asset: dg.AssetKey | None = None) -> dg.AssetCheckResult:
    """Return the result of a check. A skipped check is a warning, which never blocks.

    Dagster has a status "Skipped" for a check without a result, but derives it from the status of the run: the check is
    shown as in progress until the run ends, and as "Execution failed" if any other step fails. It also cannot show the
    reason.
    """
    figures = {
        "outcome": report.outcome,
        "measured": significant(report.measured),
        "limit": significant(report.limit),
        "partition": partition,
    }
    return dg.AssetCheckResult(
        asset_key=asset,
        passed=report.passed,
        check_name=report.name,
        severity=dg.AssetCheckSeverity.WARN if report.skipped else dg.AssetCheckSeverity(report.severity),
        description=f"Skipped: {report.detail}" if report.skipped else report.detail,
        metadata={key: value for key, value in figures.items() if value is not None},
    )
