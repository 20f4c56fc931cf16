"""The Dagster code location: ``defs`` is loaded by ``dagster dev`` and ``dg``."""

import dagster as dg

from qwen_pipeline.config import Settings, load_settings
from qwen_pipeline.defs.assets import (
    base_model,
    fine_tune,
    merged_and_padded_checkpoints,
    merged_checkpoint,
    padded_checkpoint,
)
from qwen_pipeline.defs.import_assets import imported_checkpoint, repaired_checkpoint
from qwen_pipeline.defs.jobs import process_fine_tune, repair_imported, validate_and_publish
from qwen_pipeline.defs.quantization_assets import (
    calibration_tokens,
    published_checkpoint,
    quantized_checkpoint,
    unpadded_quantized_checkpoint,
    validated_checkpoint,
)
from qwen_pipeline.defs.resources import StepRunner, configured_resources
from qwen_pipeline.defs.schedules import nightly
from qwen_pipeline.defs.sensors import fine_tune_inbox, import_inbox


def code_location(settings: Settings, steps: StepRunner | None = None) -> dg.Definitions:
    """Return all definitions, with the assets, owners and resources that the settings determine."""
    assets = [*fine_tune_assets(settings), imported_checkpoint, repaired_checkpoint]
    owners = list(settings.owners)
    return dg.Definitions(
        assets=list(dg.map_asset_specs(lambda spec: spec.replace_attributes(owners=owners), assets)),
        jobs=[process_fine_tune, validate_and_publish, repair_imported],
        sensors=[fine_tune_inbox, import_inbox],
        schedules=[nightly],
        resources={**configured_resources(settings), "steps": (steps or StepRunner()).as_resource()},
    )


def fine_tune_assets(settings: Settings) -> list[dg.AssetsDefinition]:
    """Return the assets that the settings require, from the base model to the release."""
    merging_and_padding = (
        [merged_checkpoint, padded_checkpoint] if settings.store.merged else [merged_and_padded_checkpoints]
    )
    assets = [base_model, fine_tune, *merging_and_padding, calibration_tokens, quantized_checkpoint]
    if not settings.validation.unpadded:
        return [*assets, validated_checkpoint, published_checkpoint]
    baseline = unpadded_quantized_checkpoint
    measured = validated_checkpoint.map_asset_specs(lambda spec: spec.merge_attributes(deps=[baseline]))
    return [*assets, baseline, measured, published_checkpoint]


@dg.definitions
def defs() -> dg.Definitions:
    return code_location(load_settings())
