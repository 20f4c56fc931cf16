"""Moving channels by a few strided copies where they lie evenly: a gather moves one number at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    runs = list(_runs(sources.tolist(), targets.tolist()))
    if len(runs) > _MOST_RUNS:
        return target.index_copy_(axis, targets, source.index_select(axis, sources))
    for run in runs:
        at_source, at_target = ((slice(None),) * axis + (places,) for places in run.slices())
        target[at_target] = source[at_source]
    return target


def _runs(sources: Sequence[int], targets: Sequence[int]) -> Iterator[Run]:
    """Cut pairs of indices, greedily, into runs along which both move by an even step."""
    first = 0
    while first < len(targets):
        last, step = first + 1, (1, 1)
        if last < len(targets):
            step = (sources[last] - sources[first], targets[last] - targets[first])
            while (
                step[0] > 0
                and last < len(targets)
                and (sources[last] - sources[last - 1], targets[last] - targets[last - 1]) == step
            ):
                last += 1
        yield Run(last - first, (sources[first], targets[first]), step if last - first > 1 else (1, 1))
        first = last
