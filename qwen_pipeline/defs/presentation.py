"""The assets as a person sees them in Dagster's UI: owners, freshness, automation, and links to the code."""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg

from qwen_pipeline.config import Settings
from qwen_pipeline.config.assets import Assets
from qwen_pipeline.defs.stage_assets import FINE_TUNE_GROUP

AUTOMATION = "automation"
_BASE = "base_model"
_PACKAGE = Path(__file__).parents[1]
_GIVEN = frozenset({_BASE, "fine_tune"})
"""Assets that are read, not made: nothing makes them stale but a person."""


def presented(assets: Sequence[dg.AssetsDefinition], settings: Settings) -> list[dg.AssetsDefinition]:
    """Return the assets with their owners, and as the section ``assets`` says."""
    freshness = _freshness(settings.assets)
    condition = _condition(settings)

    def present(asset: dg.AssetsDefinition, spec: dg.AssetSpec) -> dg.AssetSpec:
        name = spec.key.to_user_string()
        is_automatic = condition and spec.group_name == FINE_TUNE_GROUP and name not in _GIVEN
        return spec.replace_attributes(
            owners=list(settings.owners),
            freshness_policy=freshness.get(name),
            automation_condition=condition if is_automatic else None,
            metadata={**spec.metadata, "dagster/code_references": _code(asset, settings.assets.source_url)},
        )

    return [asset.map_asset_specs(lambda spec, asset=asset: present(asset, spec)) for asset in assets]


def automation_sensors(settings: Settings) -> list[dg.SensorDefinition]:
    """Return the sensor that evaluates the conditions, if there are any."""
    if not settings.assets.automation:
        return []
    sensor = dg.AutomationConditionSensorDefinition(
        AUTOMATION,
        target=dg.AssetSelection.groups(FINE_TUNE_GROUP),
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=30,
        description="Materializes what was made from other data, or by another version of the code, than the present.",
        emit_backfills=False,
    )
    return [sensor]


def _freshness(section: Assets) -> Mapping[str, dg.FreshnessPolicy]:
    days = {_BASE: section.base_days, "published_checkpoint": section.release_days, "lineage_audit": section.audit_days}
    return {
        name: dg.FreshnessPolicy.time_window(fail_window=timedelta(days=limit)) for name, limit in days.items() if limit
    }


def _condition(settings: Settings) -> dg.AutomationCondition[Any] | None:
    """Return the condition of an asset that a stage makes: its inputs or its code changed, and nothing is in its way.

    What descends from it is requested with it, so that one run makes all of it, and a blocking check stops that run. A
    run of the sensor makes the whole chain, so that an asset without outputs is not requested. The data version of
    several bases changes when one of them is read for the first time, and is ignored.
    """
    if not settings.assets.automation:
        return None
    condition: Any = dg.AutomationCondition
    changed = condition.any_deps_match(condition.data_version_changed() | condition.will_be_requested())
    if settings.bases:
        changed = changed.ignore(dg.AssetSelection.assets(_BASE))
    return (
        (changed | condition.code_version_changed()).since_last_handled()
        & ~condition.missing()
        & ~condition.in_progress()
        & ~condition.any_deps_missing()
        & ~condition.any_deps_in_progress()
    )


def _code(asset: dg.AssetsDefinition, source_url: str | None) -> dg.CodeReferencesMetadataValue:
    """Return a link to the function that materializes an asset."""
    function: Any = getattr(asset.op.compute_fn, "decorated_fn", asset.op.compute_fn)
    file, line = Path(inspect.getfile(function)), inspect.getsourcelines(function)[1]
    path = file.relative_to(_PACKAGE.parent).as_posix()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        if source_url:
            reference = dg.UrlCodeReference(url=f"{source_url.rstrip('/')}/{path}#L{line}", label=path)
        else:
            reference = dg.LocalFileCodeReference(file_path=str(file), line_number=line)
        return dg.CodeReferencesMetadataValue(code_references=[reference])
