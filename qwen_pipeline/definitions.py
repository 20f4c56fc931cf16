"""The Dagster code location: ``defs`` is loaded by ``dagster dev`` and ``dg``."""

import dagster as dg

from qwen_pipeline.config import Settings, load_settings
from qwen_pipeline.defs.assets import fine_tune_assets
from qwen_pipeline.defs.import_assets import imported_checkpoint, repaired_checkpoint
from qwen_pipeline.defs.jobs import process_fine_tune, repair_imported, validate_and_publish
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
        resources={**configured_resources(settings), "steps": steps or StepRunner()},
    )


@dg.definitions
def defs() -> dg.Definitions:
    return code_location(load_settings())
