"""Sizes of dtypes are those of torch, but known without importing it."""

import subprocess
import sys

from qwen_pipeline.checkpoint.dtypes import TORCH_DTYPES
from qwen_pipeline.checkpoint.safetensors_file import ITEM_BYTES


def test_every_readable_dtype_has_its_size_in_torch() -> None:
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} == dict(ITEM_BYTES)
    assert len(set(TORCH_DTYPES.values())) == len(TORCH_DTYPES)


def test_a_store_is_read_without_torch() -> None:
    code = "import sys, qwen_pipeline.checkpoint.store.derive; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
