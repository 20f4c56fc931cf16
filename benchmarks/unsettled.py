"""Engines without the correction of dead channels: the effect of padding on GPTQModel's plain solver."""

from collections.abc import Mapping
from typing import Any

from qwen_pipeline.progress import Observe
from qwen_pipeline.quantization import gptqmodel, layerwise, solver

TARGET = f"{__name__}:quantize_directory"


def quantize_directory(spec: Mapping[str, Any], observe: Observe) -> Mapping[str, Any]:
    """Call ``quantize_directory`` of the spec's engine, leaving dead channels to the library."""
    solver.settle_dead_channels = lambda *_: None
    gptqmodel.settle_dead_channels = lambda *_: None
    engine = layerwise if spec["spec"]["engine"] == "layerwise" else gptqmodel
    return engine.quantize_directory(spec, observe)
