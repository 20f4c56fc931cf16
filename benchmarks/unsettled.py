"""The layer loop without its remedy for dead channels: what GPTQModel's solver does with padding by itself."""

from collections.abc import Mapping
from typing import Any

from qwen_pipeline.engines import layerwise, solver
from qwen_pipeline.progress import Observe

TARGET = f"{__name__}:quantize_directory"


def quantize_directory(spec: Mapping[str, Any], observe: Observe) -> Mapping[str, Any]:
    """Like :func:`qwen_pipeline.engines.layerwise.quantize_directory`, leaving dead channels to the library."""
    solver.settle_dead_channels = lambda *_: None
    return layerwise.quantize_directory(spec, observe)
