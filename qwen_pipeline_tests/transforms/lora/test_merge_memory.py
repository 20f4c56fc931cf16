"""A merge needs the memory of some blocks, however large the tensor, also of DoRA embeddings and stacks of experts."""

import subprocess
import sys
from pathlib import Path

import pytest

from qwen_pipeline_tests import REPOSITORY


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), [("dora", 2**15), ("experts", 64), ("transposed experts", 64)])
def test_a_tensor_of_three_times_the_size_needs_no_more_memory(tmp_path: Path, kind: str, size: int) -> None:
    """From 64 MiB to 192 MiB the high-water mark rises by less than six blocks of 8 MiB, the most that are in use."""
    command = [sys.executable, "-m", "qwen_pipeline_tests.transforms.lora.merge_memory", str(tmp_path), kind, str(size)]
    assert int(subprocess.check_output(command, cwd=REPOSITORY, text=True)) < 48 * 2**20
