"""Tensors in memory, described and read as a checkpoint's are."""

import torch

from qwen_pipeline.checkpoint.digest import block_ranges
from qwen_pipeline.checkpoint.dtypes import TORCH_DTYPES
from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    (dtype,) = (name for name, dtype in TORCH_DTYPES.items() if dtype == tensor.dtype)
    return TensorSpec(dtype=dtype, shape=tuple(tensor.shape))


def read_in_blocks(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Read a tensor in the blocks of rows that the writer computes."""
    return torch.cat([checkpoint.tensors[name].read(start, stop) for start, stop in block_ranges(checkpoint[name])])
