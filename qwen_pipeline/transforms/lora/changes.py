"""The size of the change that a merge makes, measured on the blocks that are computed anyway, and its absence.

A training that saved the wrong weights often leaves an adapter whose merge is the base, with a ``lora_alpha`` of 0
(verl#5325) or an untouched ``lora_B``, or a whole model that was never updated.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from math import fsum, sqrt
from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.digest import block_ranges
from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.transforms.lora.adapter import Adapter
from qwen_pipeline.transforms.lora.adapter_set import AdapterSet
from qwen_pipeline.transforms.lora.adapter_tensors import Factors

if TYPE_CHECKING:
    import torch

PIECE = 2**16
"""Elements that are compared together: few enough for the processor's cache."""
SAMPLED = 8
"""Of the pieces of a block, one in so many is measured; whether a block changed at all is always exact."""
_PEEK_BYTES = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeFigures:
    """The change of a merge.

    Attributes:
        changed: Number of tensors of which at least one value changed.
        updated: Number of tensors that the adapters update.
        total: Number of tensors of the checkpoint.
        relative: Frobenius norm of the change, as a fraction of that of the tensors that are updated.
    """

    changed: int
    updated: int
    total: int
    relative: float

    @property
    def text(self) -> str:
        return f"{self.changed} of {self.total} tensors, by {self.relative:.2%} of their norm"


@dataclass(frozen=True, slots=True)
class _Block:
    stop: int
    delta: float
    before: float


@dataclass(slots=True)
class ChangeMeter:
    """Measures tensors as their merged rows are computed; the rows stay what they are."""

    _blocks: dict[str, dict[int, _Block]] = field(default_factory=dict[str, dict[int, _Block]])
    _tensors: dict[str, LazyTensor] = field(default_factory=dict[str, LazyTensor])

    def watched(
        self, name: str, before: LazyTensor, source: LazyTensor, merged: Callable[[LazyTensor], LazyTensor]
    ) -> LazyTensor:
        """Return a merged tensor whose reads are measured.

        Args:
            name: Its name.
            before: The base's tensor.
            source: The tensor that the merge begins with: ``before``, or the one that replaces it.
            merged: Returns the merged tensor that begins with the given one.
        """
        last, blocks = _Last(source), self._blocks.setdefault(name, {})
        result = merged(last.tensor)

        def read(start: int, stop: int) -> "torch.Tensor":
            rows = result.read(start, stop)
            seen = last.take()
            if source is not before or seen is None or seen.shape != rows.shape:
                seen = before.read(*(min(row, before.spec.rows) for row in (start, stop)))
            blocks[start] = _Block(stop, *_squares(rows, seen))
            return rows

        self._tensors[name] = LazyTensor(spec=result.spec, read=read)
        return self._tensors[name]

    def figures(self, output: Checkpoint) -> ChangeFigures:
        """Return the change of all tensors of an output; those that an earlier attempt wrote are read again."""
        names = [name for name in self._tensors if name in output]
        for name in names:
            self._complete(name)
        blocks = [block for name in names for block in self._blocks[name].values()]
        delta, before = fsum(block.delta for block in blocks), fsum(block.before for block in blocks)
        return ChangeFigures(
            changed=sum(any(block.delta for block in self._blocks[name].values()) for name in names),
            updated=len(names),
            total=len(output),
            relative=sqrt(delta / before) if before else float(delta > 0),
        )

    def _complete(self, name: str) -> None:
        tensor, end = self._tensors[name], 0
        for start, block in sorted(self._blocks[name].items()):
            end = max(end, block.stop) if start <= end else end
        if end < tensor.spec.rows:
            for rows in block_ranges(tensor.spec):
                tensor.read(*rows)


class _Last:
    """A tensor, and the rows that this thread read last."""

    def __init__(self, source: LazyTensor) -> None:
        self._rows = threading.local()

        def read(start: int, stop: int) -> "torch.Tensor":
            self._rows.value = rows = source.read(start, stop)
            return rows

        self.tensor = LazyTensor(spec=source.spec, read=read)

    def take(self) -> "torch.Tensor | None":
        rows = getattr(self._rows, "value", None)
        self._rows.value = None
        return rows


def _squares(after: "torch.Tensor", before: "torch.Tensor") -> tuple[float, float]:
    """Return the sums of squares of the change and of the rows before it; rows that are new count as changed."""
    common = after[: len(before)]
    pairs = list(zip(common.reshape(-1).split(PIECE), before.reshape(-1).split(PIECE), strict=True))
    sample = pairs[::SAMPLED]
    weight = len(pairs) / max(1, len(sample))
    delta = weight * sum(_square(new - old) for new, old in sample)
    if not delta:
        delta = sum(_square(new - old) for new, old in pairs)
    return delta + _square(after[len(before) :]), weight * sum(_square(old) for _, old in sample)


def _square(values: "torch.Tensor") -> float:
    import torch

    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    return float(torch.linalg.vector_norm(values, dtype=wide)) ** 2


def no_effect(adapters: AdapterSet, *, read_values: bool = True) -> str | None:
    """Return the reason why no tensor of the adapters can change the base; None if one may.

    Reads factors until one has an effect, unless ``read_values`` is False. Only low-rank updates are judged: whole
    weights and DoRA's norms may change the base.
    """
    updates = [(member, factors) for member in adapters.members for factors in member.adapter.tensors.factors.values()]
    others = any(member.adapter.tensors.saved or member.adapter.tensors.tokens for member in adapters.members)
    if others or any(factors.magnitude for _, factors in updates):
        return None
    scaled = [
        (member.adapter, factors) for member, factors in updates if member.weight * member.adapter.scaling(factors)
    ]
    if not scaled:
        alphas = sorted({f"{member.adapter.settings.lora_alpha:g}" for member in adapters.members})
        weights = sorted({f"{member.weight:g}" for member in adapters.members})
        return f"the scaling of every update is 0 (lora_alpha {', '.join(alphas)}, weight {', '.join(weights)})"
    if read_values and all(_is_zero(adapter, factors) for adapter, factors in scaled):
        return f"all {len(scaled)} updates have a factor of zeros"
    return None


def _is_zero(adapter: Adapter, factors: Factors) -> bool:
    """Return whether an update is zero: one of its factors, and its bias if it has one."""
    is_zero = any(_has_only_zeros(adapter, name) for name in (factors.up, factors.down))
    return is_zero and (factors.bias is None or _has_only_zeros(adapter, factors.bias))


def _has_only_zeros(adapter: Adapter, name: str) -> bool:
    ranges = block_ranges(adapter.weights.specs[name])
    return not any(adapter.weights.load(name, start, stop).any() for start, stop in ranges)


def is_changed(base: Checkpoint, output: Checkpoint) -> bool:
    """Return whether a whole model differs from its base in any value; values of two dtypes are compared as numbers.

    The beginnings of all tensors are read first, small tensors before large ones, so that two models that differ are
    told apart by a few reads.
    """
    names = [name for name, tensor in output.tensors.items() if tensor is not base.tensors.get(name)]
    if any(name not in base or base[name].shape != output[name].shape for name in names):
        return True
    names.sort(key=lambda name: output[name].nbytes)
    for name in names:
        spec = output[name]
        if _differ(base, output, name, 0, min(spec.rows, max(1, _PEEK_BYTES // max(1, spec.row_bytes)))):
            return True
    return any(_differ(base, output, name, *rows) for name in names for rows in block_ranges(output[name]))


def _differ(base: Checkpoint, output: Checkpoint, name: str, start: int, stop: int) -> bool:
    old, new = base.tensors[name].read(start, stop), output.tensors[name].read(start, stop)
    if old.dtype != new.dtype:
        old, new = old.double(), new.double()
    return not old.equal(new)
