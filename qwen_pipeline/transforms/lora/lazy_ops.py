"""Operations on lazy tensors: read from a file, cast, replace rows, count equal rows."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.digest import block_ranges
from qwen_pipeline.checkpoint.lazy import LazyTensor
from qwen_pipeline.transforms.lora.saved.weights import AdapterWeights

if TYPE_CHECKING:
    import torch


def lazy_tensor(weights: AdapterWeights, name: str) -> LazyTensor:
    """Return a tensor of an adapter, in its stored dtype."""

    def read(start: int, stop: int) -> "torch.Tensor":
        return weights.load(name, start, stop)

    return LazyTensor(spec=weights.specs[name], read=read)


def cast(tensor: LazyTensor, dtype: str) -> LazyTensor:
    """Return a tensor rounded to another dtype."""
    spec = replace(tensor.spec, dtype=dtype)

    def read(start: int, stop: int) -> "torch.Tensor":
        return tensor.read(start, stop).to(spec.torch_dtype)

    return LazyTensor(spec=spec, read=read)


def with_rows(tensor: LazyTensor, indices: Sequence[int], rows: LazyTensor) -> LazyTensor:
    """Return a tensor with its rows ``indices`` replaced by ``rows``, cast to its own dtype."""

    def read(start: int, stop: int) -> "torch.Tensor":
        block = tensor.read(start, stop).clone()
        for row, index in enumerate(indices):
            if start <= index < stop:
                block[index - start] = rows.read(row, row + 1)[0].to(block.dtype)
        return block

    return LazyTensor(spec=tensor.spec, read=read)


def count_equal_rows(a: LazyTensor, b: LazyTensor) -> int:
    """Return the number of common rows that are equal after rounding to the dtype of ``b``."""
    common = replace(a.spec, shape=(min(a.spec.rows, b.spec.rows), *a.spec.shape[1:]))
    dtype = b.spec.torch_dtype
    return sum(
        int((a.read(*rows).to(dtype) == b.read(*rows)).flatten(1).all(dim=1).sum()) for rows in block_ranges(common)
    )
