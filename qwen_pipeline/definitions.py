"""What ``dagster dev`` and ``dg`` load."""

import dagster as dg

from qwen_pipeline.config import load_settings
from qwen_pipeline.defs.build import code_location
from qwen_pipeline.defs.resources import Pipeline


@dg.definitions
def defs() -> dg.Definitions:
    return code_location(Pipeline(load_settings()))
