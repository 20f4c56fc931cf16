"""Low-rank updates of weights, with the same bits whatever rows are asked for together (arXiv:2106.09685).

Sums are computed in float32, for a float32 or float64 result in float64, and rounded once. PEFT rounds the delta first,
so bf16 results may differ from its in the last bit.
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
"""Rows that are computed together, counted from the top of the whole matrix.

A library may sum in another order when it is given another number of rows. All rows of a cell are always computed,
whichever are wanted. In float32 a cell also fits the processor's cache, where a block does not.
"""


class LowRank(Protocol):
    """One matrix ``up @ down`` per expert; a plain linear layer is one expert."""

    def up(self, expert: int, start: int, stop: int) -> "torch.Tensor":
        """Return rows ``start:stop`` of the factor ``[O, R]``."""
        ...

    def down(self, expert: int) -> "torch.Tensor":
        """Return the factor ``[R, I]``, with the axes of a kernel in one."""
        ...


@dataclass(frozen=True, slots=True)
class SavedFactors(LowRank):
    """The factors of an adapter, read from its file as they are needed."""

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
                return _held(self.adapter, name)[start:stop, expert :: self.adapter.experts(self.factors)]

    def down(self, expert: int) -> "torch.Tensor":
        weights, name = self.adapter.weights, self.factors.down
        match self.factors.layout:
            case "linear":
                return weights.load(name).flatten(1)
            case "embedding":
                return weights.load(name).T
            case "experts":
                rank = self.adapter.rank(self.factors)
                return weights.load(name, expert * rank, (expert + 1) * rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A low-rank update of some rows of one stored matrix.

    Attributes:
        scaling: What ``up @ down`` is multiplied with.
        expert: Which matrix of the update.
        first: The update's first row that lands here.
        onto: The stored matrix's row that it lands on.
        rows: How many rows land.
        slab: The index of the matrix in a stored stack of them; None if it is stored by itself.
    """

    update: LowRank
    scaling: float
    expert: int = 0
    first: int = 0
    onto: int = 0
    rows: int
    slab: int | None = None


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What a term adds to consecutive rows of a matrix, from row ``top`` on."""

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
    """Yield the sum of some rows of a matrix and its updates, cell by cell: which rows of ``w_NI``, and their sums.

    Args:
        w_NI: Consecutive rows of the matrix, as views of the caller's tensor if need be.
        terms: The updates of this matrix.
        start: The row of the matrix that ``w_NI`` begins with.
        height: How many rows the whole matrix has.
        wide: What is computed in. The memory that is yielded is used again for the next cell.
    """
    rows = w_NI.shape[0]
    low, high = start - start % CELL_ROWS, min(-(-(start + rows) // CELL_ROWS) * CELL_ROWS, height)
    loaded = [part for term in terms if (part := _loaded(term, low, high, wide))]
    cell = empty((CELL_ROWS, w_NI.shape[1]), wide)
    tops = range(low, high, CELL_ROWS)
    wanted = [slice(max(top - start, 0), min(top + CELL_ROWS - start, rows)) for top in tops]
    parts = w_NI.split([places.stop - places.start for places in wanted])
    for top, places, part in zip(tops, wanted, parts, strict=True):
        sum_NI = _rows(cell, 0, min(CELL_ROWS, high - top))
        inside = _rows(sum_NI, start + places.start - top, start + places.stop - top)
        if inside is not sum_NI:
            sum_NI.zero_()
        inside.copy_(part)
        for term in loaded:
            term.add_to(sum_NI, top)
        yield places, inside


def updated(weight: LazyTensor, terms: Sequence[Term], dtype: str) -> LazyTensor:
    """Return the sum of a weight, or a stack of weights, and its updates, rounded once to ``dtype``."""
    spec = replace(weight.spec, dtype=dtype)

    def read(start: int, stop: int) -> "torch.Tensor":
        rows = weight.read(start, stop)
        result = empty(tuple(rows.shape), spec.torch_dtype)
        if not any(term.slab is not None for term in terms):
            _add(rows.view(len(rows), -1), terms, result.view(len(rows), -1), start, spec)
            return result
        for slab in range(start, stop):
            own = [term for term in terms if term.slab == slab]
            _add(rows[slab - start], own, result[slab - start], 0, replace(spec, shape=spec.shape[1:]))
        return result

    return LazyTensor(spec=spec, read=read)


def transposed(weight: LazyTensor) -> LazyTensor:
    """Return a stack of matrices ``[E, O, I]`` as ``[E, I, O]``, or back."""
    experts, *matrix = weight.spec.shape

    def read(start: int, stop: int) -> "torch.Tensor":
        return weight.read(start, stop).transpose(1, 2)

    return LazyTensor(spec=replace(weight.spec, shape=(experts, *reversed(matrix))), read=read)


def wide_dtype(spec: TensorSpec) -> "torch.dtype":
    """Return what a tensor of this dtype is computed in."""
    import torch

    return torch.float64 if spec.torch_dtype.itemsize > 2 else torch.float32


def _add(
    w_NI: "torch.Tensor", terms: Sequence[Term], result_NI: "torch.Tensor", start: int, matrix: TensorSpec
) -> None:
    for rows, sum_NI in cell_sums(w_NI, terms, start, matrix.rows, wide_dtype(matrix)):
        result_NI[rows].copy_(sum_NI)


def _rows(matrix: "torch.Tensor", start: int, stop: int) -> "torch.Tensor":
    """Return rows of a matrix; all of them without asking torch, which hands Python's lock away for a view."""
    return matrix if (start, stop) == (0, matrix.shape[0]) else matrix[start:stop]


def _loaded(term: Term, low: int, high: int, wide: "torch.dtype") -> _Loaded | None:
    first, last = max(low, term.onto), min(high, term.onto + term.rows)
    if first >= last:
        return None
    shift = term.first - term.onto
    return _Loaded(
        top=first,
        up=term.update.up(term.expert, first + shift, last + shift).to(wide),
        down=term.update.down(term.expert).to(wide),
        scaling=term.scaling,
    )


@lru_cache(maxsize=4)
def _held(adapter: Adapter, name: str) -> "torch.Tensor":
    """Return a factor of a stack, whose experts lie in one another; kept, since the next expert needs it too."""
    return adapter.weights.load(name)
