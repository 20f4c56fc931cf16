"""What can be asked for: everything about one fine-tune, its proof and release again, or the repair of an import."""

import dagster as dg

from qwen_pipeline.defs.assets import GROUP, IMPORT_GROUP

process_fine_tune = dg.define_asset_job(
    "process_fine_tune",
    selection=dg.AssetSelection.groups(GROUP),
    description="From arrival to release: merge, pad, calibrate, quantize, validate, publish. What is done is free.",
)

validate_and_publish = dg.define_asset_job(
    "validate_and_publish",
    selection=dg.AssetSelection.assets("validated_checkpoint", "published_checkpoint"),
    description="Hold the quantized checkpoint against the limits as they are set now, and release it if it passes.",
)

repair_imported = dg.define_asset_job(
    "repair_imported",
    selection=dg.AssetSelection.groups(IMPORT_GROUP),
    description="Make a checkpoint that was quantized elsewhere serve the ranks of the settings.",
)
