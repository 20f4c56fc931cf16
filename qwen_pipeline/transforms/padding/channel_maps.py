"""Channels of an MLP put on a wider axis, and taken back. Tensor maths only.

A map ``source_P`` (int64, one entry for each padded channel P) names the live channel that a padded one comes from, in
rising order; :data:`NEW` is a channel of zeros. Entries that repeat are the parts of one live channel: all of them read
the same input (:func:`placed`), and each gives a share of the output (:func:`divided`), so that the sum is the live
channel's.
"""

from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.buffers import empty
from qwen_pipeline.transforms.padding.strided import copy_channels

if TYPE_CHECKING:
    import torch

NEW = -1


def placed(live: "torch.Tensor", axis: int, source_P: "torch.Tensor") -> "torch.Tensor":
    """Return each padded channel as a copy of its live one; new ones are zero."""
    shape = list(live.shape)
    shape[axis] = len(source_P)
    held = (source_P != NEW).nonzero().flatten()
    padded = empty(tuple(shape), live.dtype)
    return copy_channels(
        live, source_P[held], padded if len(held) == len(source_P) else padded.zero_(), held, axis=axis
    )


def divided(live: "torch.Tensor", axis: int, source_P: "torch.Tensor") -> "torch.Tensor":
    """Like :func:`placed`, but the parts of a channel add up to it, exactly and in its own dtype.

    Each part is half of what the parts before it left, and the last is the rest: for normal numbers another half, for
    subnormal ones what rounding left.
    """
    import torch

    padded = placed(live, axis, source_P)
    order_P, last_P = _parts(source_P)
    shared = ((order_P > 0) | ~last_P).nonzero().flatten()
    parts = padded.index_select(axis, shared)
    order, last = (_along(axis, parts, of_P[shared]) for of_P in (order_P, last_P))
    for step in range(int(order.max()) if len(shared) else 0):
        half = parts / 2
        rest = torch.where(half + half == parts, half, parts - half)
        parts = torch.where(order > step, rest, torch.where((order == step) & ~last, half, parts))
    return padded.index_copy_(axis, shared, parts)


def gathered(padded: "torch.Tensor", axis: int, source_P: "torch.Tensor") -> "torch.Tensor":
    """Return the live channels; undoes :func:`placed`."""
    return padded.index_select(axis, first_positions(source_P))


def summed(padded: "torch.Tensor", axis: int, source_P: "torch.Tensor") -> "torch.Tensor":
    """Return the live channels, each the sum of its parts, from the last part back; undoes :func:`divided`."""
    import torch

    order_P, last_P = _parts(source_P)
    ends = (last_P & (source_P != NEW)).nonzero().flatten()
    live = padded.index_select(axis, ends)
    for back in range(1, int(order_P.max()) + 1 if len(ends) else 1):
        has_part = _along(axis, live, order_P[ends] >= back)
        live = torch.where(has_part, padded.index_select(axis, (ends - back).clamp(min=0)) + live, live)
    return live


def first_positions(source_P: "torch.Tensor") -> "torch.Tensor":
    """Return where each live channel, or its first part, lies: int64, strictly rising."""
    order_P, _ = _parts(source_P)
    return ((order_P == 0) & (source_P != NEW)).nonzero().flatten()


def _parts(source_P: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """Return for each padded channel which part of its live one it is (0, 1, ...), and whether it is the last."""
    import torch

    index_P = torch.arange(len(source_P))
    starts_P = torch.ones(len(source_P), dtype=torch.bool)
    starts_P[1:] = (source_P[1:] != source_P[:-1]) | (source_P[1:] == NEW)
    order_P = index_P - torch.where(starts_P, index_P, 0).cummax(dim=0).values
    return order_P, torch.cat([starts_P[1:], starts_P.new_ones(min(1, len(starts_P)))])


def _along(axis: int, tensor: "torch.Tensor", values: "torch.Tensor") -> "torch.Tensor":
    """Shape one value per channel so that it broadcasts along ``axis``."""
    return values.reshape([-1 if dim == axis else 1 for dim in range(tensor.dim())])
