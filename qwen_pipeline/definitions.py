"""What ``dagster dev`` and ``dg`` load."""

import dagster as dg

from qwen_pipeline.config import load_settings
from qwen_pipeline.defs.resources import Pipeline
from qwen_pipeline.defs.wiring import code_location


@dg.definitions
def defs() -> dg.Definitions:
    return code_location(Pipeline(load_settings()))
