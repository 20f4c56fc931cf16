"""Functions of the Python API that are not stages."""

from pathlib import Path

from qwen_pipeline.models.hub import load_config
from qwen_pipeline.qwen.padding_spec import Targets
from qwen_pipeline.qwen.tensor_parallel.plan import USUAL_ENGINE, Option, options


def plan(model: str | Path, *, targets: Targets | None = None) -> list[Option]:
    """Return the ways to serve a model, the best first, as ``qwen-pipeline plan`` lists them.

    Args:
        model: A model directory, a ``config.json`` or a hub id; no weights are needed.
        targets: Serving engine -> its tensor-parallel degrees; by default vLLM at 2, 4 and 8.

    Raises:
        InputRefused: The model cannot be found, or its family or an engine is not supported.
    """
    return options(load_config(str(model)), targets or {USUAL_ENGINE: (2, 4, 8)})
