"""Copies of evenly spaced channels by a few strided copies, since a gather copies one number at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_MAX_RUNS = 64
"""Maximum number of runs that are copied run by run; with more, a gather is as fast."""


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` channels from index ``start`` on, every ``step``-th: (source, target) each."""

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
    """Copy channel ``sources[n]`` of one tensor to channel ``targets[n]`` of the other, which is returned.

    Args:
        source: The tensor to copy from.
        sources: Its channels, int64 ``[N]``, nondecreasing.
        target: The tensor to copy into, in place.
        targets: Its channels, int64 ``[N]``, strictly increasing.
        axis: The axis of the channels in both tensors.
    """
    runs = list(islice(_runs(sources, targets), _MAX_RUNS + 1))
    if len(runs) > _MAX_RUNS:
        if len(targets) == target.shape[axis]:
            return gather(source, sources, target, axis=axis)
        return target.index_copy_(axis, targets, source.index_select(axis, sources))
    for run in runs:
        source_index, target_index = ((slice(None),) * axis + (channels,) for channels in run.slices())
        target[target_index] = source[source_index]
    return target


def gather(source: "torch.Tensor", sources: "torch.Tensor", target: "torch.Tensor", *, axis: int) -> "torch.Tensor":
    """Copy channel ``sources[n]`` of one tensor to channel ``n`` of the other, which is returned.

    NumPy copies numbers of any dtype as integers of its size, several times as fast as ``index_select`` along rows.
    """
    import numpy as np
    import torch

    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[source.itemsize]
    np.take(source.view(words).numpy(), sources.numpy(), axis=axis, out=target.view(words).numpy(), mode="clip")
    return target


def _runs(sources: "torch.Tensor", targets: "torch.Tensor") -> Iterator[Run]:
    """Yield the pairs of indices as runs, chosen greedily, along which both indices have a constant step.

    The loop is over runs, not channels, and reads numbers from NumPy, because a call of torch releases the GIL and then
    waits to get it back.
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
