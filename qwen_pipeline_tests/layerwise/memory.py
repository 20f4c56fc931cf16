"""Memory bound of a layer-streamed computation."""

import subprocess
import sys
from pathlib import Path

import pytest

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline_tests import REPOSITORY
from qwen_pipeline_tests.tiny import tiny_qwen2


def require_a_layer_and_a_half(root: Path, module: str) -> None:
    """Require that the peak memory is below one and a half float32 layers, and independent of the number of layers.

    Args:
        root: Directory for the models, of 2 and of 6 layers.
        module: Program that takes a model and prints the bytes by which its memory grew.
    """
    peaks: list[int] = []
    for layers in (2, 6):
        model = tiny_qwen2(root / str(layers), hidden_size=1024, intermediate_size=5632, num_hidden_layers=layers)
        peaks.append(int(subprocess.check_output([sys.executable, "-m", module, model], cwd=REPOSITORY)))
    layer = 2 * sum(spec.nbytes for name, spec in open_checkpoint(model).items() if "layers.0." in name)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.1)
    assert peaks[1] < 1.5 * layer
