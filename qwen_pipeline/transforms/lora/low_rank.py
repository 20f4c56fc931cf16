"""Low-rank updates of weights, bit for bit independent of the rows that are read together (arXiv:2106.09685).

Sums are computed in float32, or in float64 for a float32 or float64 result, and rounded once. PEFT rounds the delta
first, so bfloat16 results may differ from PEFT's in the last bit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from qwen_pipeline.checkpoint.buffers import empty
from qwen_pipeline.checkpoint.lazy import LazyTensor
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.transforms.lora.adapter import Adapter
from qwen_pipeline.transforms.lora.adapter_tensors import Factors

if TYPE_CHECKING:
    import torch

CELL_ROWS = 64
"""Number of rows that are computed together, counted from the first row of the matrix.

A BLAS library may sum in another order for another number of rows, so all rows of a cell are computed even if only some
are read. In float32 a cell also fits into the processor's cache, which a block does not.
"""


class LowRank(Protocol):
    """One matrix ``up @ down`` per expert; a plain linear layer is one expert."""

    def up(self, expert: int, start: int, stop: int) -> "torch.Tensor":
        """Return rows ``start:stop`` of the factor ``[O, R]``."""
        ...

    def down(self, expert: int) -> "torch.Tensor":
        """Return the factor ``[R, I]``; of a convolution, the axes of the kernel are flattened into I."""
        ...


@dataclass(frozen=True, slots=True)
class SavedFactors(LowRank):
    """The factors of an adapter, read from its file on demand."""

    adapter: Adapter
    factors: Factors

    def up(self, expert: int, start: int, stop: int) -> "torch.Tensor":
        weights, name = self.adapter.weights, self.factors.up
        match self.factors.layout:
            case "linear":
                return weights.load(name, start, stop).flatten(1)
            case "embedding":
                return weights.load_columns(name, start, stop).T
            case "experts":
                return _loaded_factor(self.adapter, name)[start:stop, self._columns(expert)]
            case "swapped experts":
                return self._rows(name, expert).T[start:stop].contiguous()

    def down(self, expert: int) -> "torch.Tensor":
        weights, name = self.adapter.weights, self.factors.down
        match self.factors.layout:
            case "linear":
                return weights.load(name).flatten(1)
            case "embedding":
                return weights.load(name).T
            case "experts":
                return self._rows(name, expert)
            case "swapped experts":
                return _loaded_factor(self.adapter, name)[:, self._columns(expert)].T.contiguous()

    def _rows(self, name: str, expert: int) -> "torch.Tensor":
        """Return an expert's rows of A."""
        rank = self.adapter.rank(self.factors)
        return self.adapter.weights.load(name, expert * rank, (expert + 1) * rank)

    def _columns(self, expert: int) -> slice:
        """Return an expert's columns of B."""
        if self.factors.grouped_by_expert:
            rank = self.adapter.rank(self.factors)
            return slice(expert * rank, (expert + 1) * rank)
        return slice(expert, None, self.adapter.experts(self.factors))


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A low-rank update of consecutive rows of one stored matrix.

    Attributes:
        scaling: The factor of ``up @ down``.
        expert: Index of the matrix in the update.
        source_row: First row of the update that is used.
        target_row: Row of the stored matrix that it is added to.
        rows: Number of rows.
        stack_index: Index of the matrix in a stored stack; None if the matrix is a tensor of its own.
    """

    update: LowRank
    scaling: float
    expert: int = 0
    source_row: int = 0
    target_row: int = 0
    rows: int
    stack_index: int | None = None


@dataclass(frozen=True, slots=True)
class _LoadedTerm:
    """The loaded factors of a term for consecutive rows of a matrix, from row ``top`` on."""

    top: int
    up: "torch.Tensor"
    down: "torch.Tensor"
    scaling: float

    def add_to(self, cell_NI: "torch.Tensor", start: int) -> None:
        low, high = max(start, self.top), min(start + cell_NI.shape[0], self.top + self.up.shape[0])
        if low < high:
            rows, up = _rows(cell_NI, low - start, high - start), _rows(self.up, low - self.top, high - self.top)
            rows.addmm_(up, self.down, alpha=self.scaling)


def cell_sums(
    w_NI: "torch.Tensor", terms: Sequence[Term], start: int, height: int, wide: "torch.dtype"
) -> Iterator[tuple[slice, "torch.Tensor"]]:
    """Yield the sums of rows of a matrix and its updates, one cell at a time, as (rows of ``w_NI``, sums).

    The yielded memory is reused for the next cell.

    Args:
        w_NI: Consecutive rows of the matrix; may be a view.
        terms: The updates of this matrix.
        start: The row of the matrix that ``w_NI`` begins with.
        height: Number of rows of the whole matrix.
        wide: The dtype to compute in.
    """
    rows = w_NI.shape[0]
    low, high = start - start % CELL_ROWS, min(-(-(start + rows) // CELL_ROWS) * CELL_ROWS, height)
    loaded = [part for term in terms if (part := _load_term(term, low, high, wide))]
    cell = empty((CELL_ROWS, w_NI.shape[1]), wide)
    tops = range(low, high, CELL_ROWS)
    requested = [slice(max(top - start, 0), min(top + CELL_ROWS - start, rows)) for top in tops]
    parts = w_NI.split([span.stop - span.start for span in requested])
    for top, span, part in zip(tops, requested, parts, strict=True):
        sum_NI = _rows(cell, 0, min(CELL_ROWS, high - top))
        inside = _rows(sum_NI, start + span.start - top, start + span.stop - top)
        if inside is not sum_NI:
            sum_NI.zero_()
        inside.copy_(part)
        for term in loaded:
            term.add_to(sum_NI, top)
        yield span, inside


def updated(weight: LazyTensor, terms: Sequence[Term], dtype: str) -> LazyTensor:
    """Return the sum of a weight (or a stack of weights) and its updates, rounded once to ``dtype``."""
    spec = replace(weight.spec, dtype=dtype)

    def read(start: int, stop: int) -> "torch.Tensor":
        rows = weight.read(start, stop)
        result = empty(tuple(rows.shape), spec.torch_dtype)
        if not any(term.stack_index is not None for term in terms):
            _add(rows.view(len(rows), -1), terms, result.view(len(rows), -1), start, spec)
            return result
        for index in range(start, stop):
            matrix_terms = [term for term in terms if term.stack_index == index]
            _add(rows[index - start], matrix_terms, result[index - start], 0, replace(spec, shape=spec.shape[1:]))
        return result

    return LazyTensor(spec=spec, read=read)


def transposed(weight: LazyTensor) -> LazyTensor:
    """Return a stack of matrices with the last two axes swapped: ``[E, O, I]`` as ``[E, I, O]``, or back."""
    experts, *matrix = weight.spec.shape

    def read(start: int, stop: int) -> "torch.Tensor":
        return weight.read(start, stop).transpose(1, 2)

    return LazyTensor(spec=replace(weight.spec, shape=(experts, *reversed(matrix))), read=read)


def wide_dtype(spec: TensorSpec) -> "torch.dtype":
    """Return the dtype that a tensor of this dtype is computed in."""
    import torch

    return torch.float64 if spec.torch_dtype.itemsize > 2 else torch.float32


def _add(
    w_NI: "torch.Tensor", terms: Sequence[Term], result_NI: "torch.Tensor", start: int, matrix: TensorSpec
) -> None:
    for rows, sum_NI in cell_sums(w_NI, terms, start, matrix.rows, wide_dtype(matrix)):
        result_NI[rows].copy_(sum_NI)


def _rows(matrix: "torch.Tensor", start: int, stop: int) -> "torch.Tensor":
    """Return rows of a matrix; if all of them, the matrix itself, because torch releases the GIL to create a view."""
    return matrix if (start, stop) == (0, matrix.shape[0]) else matrix[start:stop]


def _load_term(term: Term, low: int, high: int, wide: "torch.dtype") -> _LoadedTerm | None:
    first, last = max(low, term.target_row), min(high, term.target_row + term.rows)
    if first >= last:
        return None
    shift = term.source_row - term.target_row
    return _LoadedTerm(
        top=first,
        up=term.update.up(term.expert, first + shift, last + shift).to(wide),
        down=term.update.down(term.expert).to(wide),
        scaling=term.scaling,
    )


@lru_cache(maxsize=4)
def _loaded_factor(adapter: Adapter, name: str) -> "torch.Tensor":
    """Return a factor of a stack; cached because its experts are interleaved, so the next expert needs it again."""
    return adapter.weights.load(name)
