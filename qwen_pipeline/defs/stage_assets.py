"""Code shared by the assets: a decorator for the asset of a stage, and the results of steps."""

# pyright: reportMissingTypeArgument=false, reportUnknownParameterType=false
# Dagster recognizes MaterializeResult in a signature only without its type argument.

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import dagster as dg

from qwen_pipeline.checkpoint.store.destinations import Artifact
from qwen_pipeline.config.assets import Costs
from qwen_pipeline.defs.checks import asset_check_result, asset_check_specs
from qwen_pipeline.defs.metadata import artifact_metadata, directory_metadata, measured_metadata
from qwen_pipeline.defs.partitions import FINE_TUNES
from qwen_pipeline.models.inbox import Arrival
from qwen_pipeline.reports import CheckReport, CheckSpec, load_reports

FINE_TUNE_GROUP = "fine_tune_to_release"
IMPORT_GROUP = "import_to_repair"

COMPLETE = CheckSpec(
    name="complete",
    description="The upload is complete: no file is marked as partial, and none is shorter than its header states.",
)


def stage_asset(
    stage: ModuleType,
    *,
    deps: Sequence[dg.AssetsDefinition],
    kinds: set[str],
    of: str = "checkpoint",
    pool: str | None = None,
    more_checks: Sequence[CheckSpec] = (),
    group: str = FINE_TUNE_GROUP,
    partitions: dg.PartitionsDefinition = FINE_TUNES,
) -> Callable[[Callable[..., dg.MaterializeResult]], dg.AssetsDefinition]:
    """Return a decorator for the asset ``<stage>_<of>``, with the code version and the checks of its stage."""
    name = f"{stage.STAGE}_{of}"
    return dg.asset(
        name=name,
        deps=deps,
        partitions_def=partitions,
        group_name=group,
        kinds=kinds,
        code_version=stage.CODE_VERSION,
        check_specs=asset_check_specs(name, [*stage.CHECKS, *more_checks], partitions),
        pool=pool,
    )


def stage_result(
    artifact: Artifact,
    partition: str,
    *,
    prices: Costs,
    asset: dg.AssetKey | None = None,
    more_reports: Sequence[CheckReport] = (),
    **metadata: Any,
) -> dg.MaterializeResult:
    """Return the materialization of a stage's output, with its checks.

    The content digest is the data version: if the bytes did not change, downstream assets stay fresh.
    """
    manifest = artifact.manifest
    reports = [*load_reports(manifest.result), *more_reports]
    return dg.MaterializeResult(
        asset_key=asset,
        data_version=dg.DataVersion(manifest.content_digest),
        metadata={**measured_metadata(reports), **metadata, **artifact_metadata(artifact, prices)},
        check_results=[asset_check_result(report, partition, asset) for report in reports],
    )


def needless_result(partition: str, *, because: str, checks: Sequence[CheckSpec] = ()) -> dg.MaterializeResult:
    """Return the materialization of an asset that a partition does not need: nothing is made, checks are skipped."""
    return dg.MaterializeResult(
        data_version=dg.DataVersion("needless"),
        metadata={"remark": because},
        check_results=[asset_check_result(check.skipped(because), partition) for check in checks],
    )


def upload_result(upload: Arrival, partition: str, digest: str, obstacle: str | None) -> dg.MaterializeResult:
    """Return the materialization of an upload; ``obstacle`` is the reason if it is not complete."""
    report = COMPLETE.report(
        passed=obstacle is None, detail=obstacle or "Every file is present and has its full length."
    )
    return dg.MaterializeResult(
        data_version=dg.DataVersion(digest),
        metadata=directory_metadata(upload.path, digest, upload.nbytes),
        check_results=[asset_check_result(report, partition)],
    )
