"""The Dagster code location: ``defs`` is loaded by ``dagster dev`` and ``dg``."""

import dagster as dg

from qwen_pipeline.config import Settings, load_settings, settings_of
from qwen_pipeline.defs.arrivals.inbox_asset import inbox
from qwen_pipeline.defs.arrivals.sensors import fine_tune_inbox, import_inbox
from qwen_pipeline.defs.assets import (
    base_model,
    fine_tune,
    merged_and_padded_checkpoints,
    merged_checkpoint,
    otherwise_merged_checkpoint,
    padded_checkpoint,
)
from qwen_pipeline.defs.execution.placement import executor_of, placed
from qwen_pipeline.defs.import_assets import imported_checkpoint, repaired_checkpoint
from qwen_pipeline.defs.jobs import process_fine_tune, promote_release, repair_imported, validate_and_publish
from qwen_pipeline.defs.operations.catalogue_sensor import catalogue_sensor
from qwen_pipeline.defs.operations.lineage_assets import audit_lineage, lineage_audit, weekly_audit
from qwen_pipeline.defs.operations.notification_sensor import notification_sensor
from qwen_pipeline.defs.operations.release_assets import RELEASE_GROUP, production_release
from qwen_pipeline.defs.operations.retention_assets import collect_garbage, retention, weekly_retention
from qwen_pipeline.defs.presentation import automation_sensors, presented
from qwen_pipeline.defs.quantization_assets import (
    calibration_tokens,
    published_checkpoint,
    quantized_checkpoint,
    unpadded_quantized_checkpoint,
    validated_checkpoint,
)
from qwen_pipeline.defs.resources import StepRunner, configured_resources
from qwen_pipeline.defs.schedules import nightly
from qwen_pipeline.defs.stage_assets import FINE_TUNE_GROUP

MERGED, PADDED = "merged_checkpoint", "padded_checkpoint"


def code_location(settings: Settings, steps: StepRunner | None = None) -> dg.Definitions:
    """Return all definitions, with the assets, owners and resources that the settings determine."""
    assets = [*fine_tune_assets(settings), imported_checkpoint, repaired_checkpoint, lineage_audit, inbox, retention]
    telling = [notification_sensor(settings.notify)] if settings.notify.urls else []
    telling += [catalogue_sensor(settings.openlineage)] if settings.openlineage.is_on else []
    return dg.Definitions(
        assets=presented(placed(assets, settings), settings),
        jobs=[
            process_fine_tune,
            validate_and_publish,
            repair_imported,
            promote_release,
            audit_lineage,
            collect_garbage,
        ],
        sensors=[fine_tune_inbox, import_inbox, *telling, *automation_sensors(settings)],
        schedules=[nightly, weekly_audit, weekly_retention],
        resources={**configured_resources(settings), "steps": (steps or _step_runner(settings)).as_resource()},
        executor=executor_of(settings.execution),
    )


def _step_runner(settings: Settings) -> StepRunner:
    return StepRunner(dies_with_parent=settings.execution.kind == "ray")


def fine_tune_assets(settings: Settings) -> list[dg.AssetsDefinition]:
    """Return the assets that the settings require, from the base model to the release."""
    merging_and_padding = (
        [merged_checkpoint, padded_checkpoint] if settings.store.merged else [merged_and_padded_checkpoints]
    )
    calibrating_and_quantizing = (
        [calibration_tokens, quantized_checkpoint]
        if _needs_calibration(settings)
        else [quantized_checkpoint.map_asset_specs(lambda spec: spec.replace_attributes(deps=[PADDED]))]
    )
    assets = [base_model, fine_tune, *merging_and_padding, *calibrating_and_quantizing]
    compared = _compared_assets(settings)
    measured = validated_checkpoint.map_asset_specs(lambda spec: spec.merge_attributes(deps=compared))
    return [*assets, *compared, measured, published_checkpoint, _production(settings)]


def _needs_calibration(settings: Settings) -> bool:
    """Return whether the recipe of any product needs calibration tokens."""
    recipes = [settings, *(settings_of(settings, recipe) for recipe in settings.recipes)]
    return any(recipe.quantization.needs_calibration for recipe in recipes)


def _compared_assets(settings: Settings) -> list[dg.AssetsDefinition]:
    """Return the assets that exist only for a validation to compare with."""
    baseline = unpadded_quantized_checkpoint
    if not _needs_calibration(settings):
        baseline = baseline.map_asset_specs(lambda spec: spec.replace_attributes(deps=[MERGED]))
    wanted = {baseline: settings.validation.unpadded, otherwise_merged_checkpoint: settings.validation.other_merge}
    return [asset for asset, is_wanted in wanted.items() if is_wanted]


def _production(settings: Settings) -> dg.AssetsDefinition:
    """Return the release in production; runs of a fine-tune end with it if it waits for no person."""
    release = settings.release
    waits = release.approval == "required" or release.promote == "manual"
    group = RELEASE_GROUP if waits else FINE_TUNE_GROUP
    return production_release.map_asset_specs(lambda spec: spec.replace_attributes(group_name=group))


@dg.definitions
def defs() -> dg.Definitions:
    return code_location(load_settings())
