"""What a layer-streamed computation may hold in memory."""

import subprocess
import sys
from pathlib import Path

import pytest

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline_tests import REPOSITORY
from qwen_pipeline_tests.tiny import tiny_qwen2


def require_a_layer_and_a_half(root: Path, code: str) -> None:
    """Run ``code`` on models of 2 and of 6 layers below ``root``; it prints its peak bytes above what it started with.

    The peaks must be alike, and below one and a half layers in float32.
    """
    peaks: list[int] = []
    for layers in (2, 6):
        model = tiny_qwen2(root / str(layers), hidden_size=1024, intermediate_size=5632, num_hidden_layers=layers)
        peaks.append(int(subprocess.check_output([sys.executable, "-c", code, model], cwd=REPOSITORY)))
    layer = 2 * sum(spec.nbytes for name, spec in open_checkpoint(model).items() if "layers.0." in name)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.1)
    assert peaks[1] < 1.5 * layer
