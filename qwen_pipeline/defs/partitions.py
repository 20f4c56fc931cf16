"""Dynamic partitions: one per product of a fine-tune and one per imported checkpoint, added when its upload is found.

The key of a product is ``<fine-tune>``, or ``<fine-tune>@<recipe>`` if it is made by another recipe than the default.
"""

import dagster as dg

from qwen_pipeline.checkpoint.store.products import DEFAULT_RECIPE, product

FINE_TUNES = dg.DynamicPartitionsDefinition(name="fine_tunes")
IMPORTS = dg.DynamicPartitionsDefinition(name="imports")

PARTITION_TAG = "dagster/partition"
"""Dagster's tag of a run: its partition."""
FINE_TUNE_TAG = "qwen_pipeline/fine_tune"
"""Tag of a run: the fine-tune of its partition. The default instance runs one at a time: products share stages."""
RECIPE_TAG = "qwen_pipeline/recipe"
"""Tag of a run: the recipe of its product."""
BASE_TAG = "qwen_pipeline/base"
"""Tag of a run: the base of its fine-tune, if the settings have several."""
STAGE_TAG = "qwen_pipeline/stage"
"""Tag of a run: the asset that it materializes, or did last. That of a failed run is where it failed."""
TRIGGER_TAG = "qwen_pipeline/trigger"
"""Tag of a run: the sensor, schedule, command or job that started it."""


def product_tags(key: str, base: str = "") -> dict[str, str]:
    """Return the tags of a run of a product, and of its base if that is known."""
    named = product(key)
    tags = {FINE_TUNE_TAG: named.fine_tune, RECIPE_TAG: named.recipe or DEFAULT_RECIPE}
    return tags | ({BASE_TAG: base} if base else {})
