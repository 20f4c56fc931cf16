"""The jobs: a fine-tune from upload to release, only its validation and release, and the repair of an import."""

import dagster as dg

from qwen_pipeline.defs.stage_assets import FINE_TUNE_GROUP, IMPORT_GROUP

process_fine_tune = dg.define_asset_job(
    "process_fine_tune",
    selection=dg.AssetSelection.groups(FINE_TUNE_GROUP),
    description="Merge, pad, calibrate, quantize, validate and publish a fine-tune. Finished stages are reused.",
)

validate_and_publish = dg.define_asset_job(
    "validate_and_publish",
    selection=dg.AssetSelection.assets("validated_checkpoint", "published_checkpoint"),
    description="Validate the quantized checkpoint against the current limits, and publish it if it passes.",
)

repair_imported = dg.define_asset_job(
    "repair_imported",
    selection=dg.AssetSelection.groups(IMPORT_GROUP),
    description="Repair a checkpoint that was quantized elsewhere, so that it can be served on the configured ranks.",
)
