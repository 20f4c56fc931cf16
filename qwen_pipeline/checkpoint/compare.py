"""Comparison of lazy tensors, block by block."""

from qwen_pipeline.checkpoint.digest import block_ranges
from qwen_pipeline.checkpoint.hashing_reader import hashing_paused
from qwen_pipeline.checkpoint.lazy import LazyTensor


def are_equal(a: LazyTensor, b: LazyTensor) -> bool:
    """Return whether two tensors have the same shape and values; dtypes may differ."""
    import torch

    if a.spec.shape != b.spec.shape:
        return False
    wide = torch.promote_types(a.spec.torch_dtype, b.spec.torch_dtype)
    with hashing_paused():
        return all(a.read(*rows).to(wide).equal(b.read(*rows).to(wide)) for rows in block_ranges(a.spec))
