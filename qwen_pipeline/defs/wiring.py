"""The whole code location as a function of the settings, for the server and for runs without one."""

import dagster as dg

from qwen_pipeline.defs.assets import graph
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
