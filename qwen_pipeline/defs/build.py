"""The whole code location as a function of the settings, for the server and for runs without one."""

import dagster as dg

from qwen_pipeline.config import Settings
from qwen_pipeline.defs.assets import (
    base_model,
    calibration_tokens,
    fine_tune,
    imported_checkpoint,
    merged_checkpoint,
    padded_checkpoint,
    published_checkpoint,
    quantized_checkpoint,
    repaired_checkpoint,
    validated_checkpoint,
)
from qwen_pipeline.defs.comparison import unpadded_quantized
from qwen_pipeline.defs.jobs import process_fine_tune, repair_imported, validate_and_publish
from qwen_pipeline.defs.resources import Pipeline
from qwen_pipeline.defs.schedules import nightly
from qwen_pipeline.defs.sensors import fine_tune_inbox, import_inbox


def code_location(pipeline: Pipeline) -> dg.Definitions:
    return dg.Definitions(
        assets=graph(pipeline.settings),
        jobs=[process_fine_tune, validate_and_publish, repair_imported],
        sensors=[fine_tune_inbox, import_inbox],
        schedules=[nightly],
        resources={"pipeline": pipeline},
    )


def graph(settings: Settings) -> list[dg.AssetsDefinition]:
    """Every asset that the settings ask for, with the owners that they name."""
    assets = [
        base_model,
        fine_tune,
        merged_checkpoint,
        padded_checkpoint,
        calibration_tokens,
        quantized_checkpoint,
        validated_checkpoint,
        published_checkpoint,
        imported_checkpoint,
        repaired_checkpoint,
    ]
    compared = [unpadded_quantized] if settings.validation.unpadded else []

    def as_set(spec: dg.AssetSpec) -> dg.AssetSpec:
        more = [dg.AssetDep(asset.key) for asset in compared] if spec.key == validated_checkpoint.key else []
        return spec.replace_attributes(owners=list(settings.owners), deps=[*spec.deps, *more])

    return list(dg.map_asset_specs(as_set, [*assets, *compared]))
