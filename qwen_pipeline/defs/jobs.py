"""What can be asked for: everything about one fine-tune, or its proof and release again."""

import dagster as dg

process_fine_tune = dg.define_asset_job(
    "process_fine_tune",
    selection=dg.AssetSelection.all(),
    description="From arrival to release: merge, pad, quantize, validate, publish. What is up to date costs nothing.",
)

validate_and_publish = dg.define_asset_job(
    "validate_and_publish",
    selection=dg.AssetSelection.assets("validated_checkpoint", "published_checkpoint"),
    description="Hold the quantized checkpoint against the limits as they are set now, and release it if it passes.",
)
