"""The jobs: a fine-tune from upload to release, only its validation and release, and the repair of an import."""

import dagster as dg

from qwen_pipeline.defs.partitions import FINE_TUNES, product_tags
from qwen_pipeline.defs.stage_assets import FINE_TUNE_GROUP, IMPORT_GROUP

_OF_PRODUCT = dg.PartitionedConfig(
    partitions_def=FINE_TUNES, run_config_for_partition_key_fn=lambda _: {}, tags_for_partition_key_fn=product_tags
)
"""Tags of every run of a partition, however it is launched."""

process_fine_tune = dg.define_asset_job(
    "process_fine_tune",
    selection=dg.AssetSelection.groups(FINE_TUNE_GROUP),
    config=_OF_PRODUCT,
    description="Merge, pad, calibrate, quantize, validate and publish a fine-tune. Finished stages are reused.",
)

validate_and_publish = dg.define_asset_job(
    "validate_and_publish",
    selection=dg.AssetSelection.assets("validated_checkpoint", "published_checkpoint"),
    config=_OF_PRODUCT,
    description="Validate the quantized checkpoint against the current limits, and publish it if it passes.",
)

promote_release = dg.define_asset_job(
    "promote_release",
    selection=dg.AssetSelection.assets("production_release"),
    config=_OF_PRODUCT,
    description="Point `production` at the last release of a fine-tune, once its checks pass.",
)

repair_imported = dg.define_asset_job(
    "repair_imported",
    selection=dg.AssetSelection.groups(IMPORT_GROUP),
    description="Repair a checkpoint that was quantized elsewhere, so that it can be served on the configured ranks.",
)
