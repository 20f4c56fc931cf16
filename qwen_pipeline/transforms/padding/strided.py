"""Moving channels by a few strided copies where they lie evenly: a gather moves one number at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_MOST_RUNS = 64
"""With more, copying run by run is no faster than a gather."""


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` channels, from every ``step``-th place from ``start`` on in either tensor: (source, target)."""

    count: int
    start: tuple[int, int]
    step: tuple[int, int]

    def slices(self) -> tuple[slice, slice]:
        source, target = (
            slice(start, start + (self.count - 1) * step + 1, step)
            for start, step in zip(self.start, self.step, strict=True)
        )
        return source, target


def copy_channels(
    source: "torch.Tensor", sources: "torch.Tensor", target: "torch.Tensor", targets: "torch.Tensor", *, axis: int
) -> "torch.Tensor":
    """Copy channel ``sources[n]`` of one tensor to channel ``targets[n]`` of the other, for rising indices.

    Args:
        source: Where channels come from.
        sources: int64 ``[N]``, not falling.
        target: Is changed, and returned.
        targets: int64 ``[N]``, rising.
        axis: The axis of the channels in both.
    """
    runs = list(islice(_runs(sources, targets), _MOST_RUNS + 1))
    if len(runs) > _MOST_RUNS:
        if len(targets) == target.shape[axis]:
            return gather(source, sources, target, axis=axis)
        return target.index_copy_(axis, targets, source.index_select(axis, sources))
    for run in runs:
        at_source, at_target = ((slice(None),) * axis + (places,) for places in run.slices())
        target[at_target] = source[at_source]
    return target


def gather(source: "torch.Tensor", sources: "torch.Tensor", target: "torch.Tensor", *, axis: int) -> "torch.Tensor":
    """Copy channel ``sources[n]`` of one tensor to channel ``n`` of the other, which is returned.

    NumPy copies numbers of any dtype as words of its size, several times as fast as ``index_select`` along rows does.
    """
    import numpy as np
    import torch

    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[source.itemsize]
    np.take(source.view(words).numpy(), sources.numpy(), axis=axis, out=target.view(words).numpy(), mode="clip")
    return target


def _runs(sources: "torch.Tensor", targets: "torch.Tensor") -> Iterator[Run]:
    """Cut pairs of indices, greedily, into runs along which both move by an even step.

    Python counts runs here, not channels, and asks NumPy for each number: every call of torch hands Python's lock to
    another thread, and waits until it is given back.
    """
    source, target = sources.numpy(), targets.numpy()
    count = len(target)
    source_steps, target_steps = source[1:] - source[:-1], target[1:] - target[:-1]
    turns = (source_steps[1:] != source_steps[:-1]) | (target_steps[1:] != target_steps[:-1])
    ends = iter([*(turns.nonzero()[0] + 1).tolist(), count - 1])
    first, end = 0, 0
    while first < count:
        while end <= first < count - 1:
            end = next(ends)
        moves = first < count - 1 and bool(source_steps[first] > 0)
        last, step = (end, (int(source_steps[first]), int(target_steps[first]))) if moves else (first, (1, 1))
        yield Run(last - first + 1, (int(source[first]), int(target[first])), step)
        first = last + 1
