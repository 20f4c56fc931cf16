"""DoRA: the rows of the merged weight, or the columns of an embedding, are scaled to trained norms (arXiv:2402.09353).

PEFT divides by the norm of ``W + scaling * B @ A``: for a linear layer over the inputs of each output, for an embedding
over the vocabulary for each dimension. The latter needs all rows before the first can be written: a separate pass.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.buffers import empty
from qwen_pipeline.checkpoint.digest import block_ranges
from qwen_pipeline.checkpoint.lazy import LazyTensor
from qwen_pipeline.transforms.lora.low_rank import Term, cell_sums, wide_dtype

if TYPE_CHECKING:
    import torch


def renormed_rows(weight: LazyTensor, terms: Sequence[Term], norms: LazyTensor, dtype: str) -> LazyTensor:
    """Return ``W + scaling * B @ A`` with each row scaled to its trained norm, rounded once to ``dtype``."""
    spec = replace(weight.spec, dtype=dtype)

    def read(start: int, stop: int) -> "torch.Tensor":
        w_NI, trained_N = weight.read(start, stop), _trained(norms)[start:stop]
        result = empty(tuple(w_NI.shape), spec.torch_dtype)
        flat_NI = result.view(len(w_NI), -1)
        for rows, sum_NI in cell_sums(w_NI.view(len(w_NI), -1), terms, start, spec.rows, wide_dtype(spec)):
            factors_N = _factors(trained_N[rows].to(sum_NI), sum_NI.norm(dim=1))
            flat_NI[rows].copy_(sum_NI.mul_(factors_N.unsqueeze(1)))
        return result

    return LazyTensor(spec=spec, read=read)


def renormed_columns(weight: LazyTensor, terms: Sequence[Term], norms: LazyTensor, dtype: str) -> LazyTensor:
    """Return ``W + scaling * B @ A`` with each column scaled to its trained norm, rounded once to ``dtype``."""
    spec, lock = replace(weight.spec, dtype=dtype), Lock()

    @cache
    def factors() -> "torch.Tensor":
        squares_I = _trained(norms).double().zero_()
        for start, stop in block_ranges(weight.spec):
            for _, sum_NI in cell_sums(weight.read(start, stop), terms, start, spec.rows, wide_dtype(spec)):
                squares_I += sum_NI.double().square_().sum(dim=0)
        return _factors(_trained(norms).double(), squares_I.sqrt()).to(wide_dtype(spec))

    def read(start: int, stop: int) -> "torch.Tensor":
        with lock:
            factors_I = factors()
        w_NI = weight.read(start, stop)
        result_NI = empty(tuple(w_NI.shape), spec.torch_dtype)
        for rows, sum_NI in cell_sums(w_NI, terms, start, spec.rows, wide_dtype(spec)):
            result_NI[rows].copy_(sum_NI.mul_(factors_I))
        return result_NI

    return LazyTensor(spec=spec, read=read)


def _factors(trained: "torch.Tensor", computed: "torch.Tensor") -> "torch.Tensor":
    """Return the scaling factors; zero where the computed norm is zero, as in the rows that padding added."""
    return (trained / computed).where(computed > 0, 0)


def _trained(norms: LazyTensor) -> "torch.Tensor":
    return norms.read(0, norms.spec.rows).flatten()
