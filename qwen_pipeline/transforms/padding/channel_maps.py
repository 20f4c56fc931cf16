"""Maps from live to padded channels, applied to a tensor or undone. Tensor operations only.

A map ``source_P`` (int64, one entry for each padded channel P) holds the index of the live channel that a padded one is
made from, in ascending order; :data:`NEW` is a channel of zeros. Repeated entries are the parts of one split channel:
all have its input weights (:func:`placed`), and their output weights sum to its output weights (:func:`divided`).
"""

from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.buffers import empty
from qwen_pipeline.transforms.padding.strided import copy_channels

if TYPE_CHECKING:
    import torch

NEW = -1


def placed(live: "torch.Tensor", axis: int, source_P: "torch.Tensor") -> "torch.Tensor":
    """Return the padded channels as copies of the live ones; new ones are zero."""
    if live.device.type != "cpu":
        return selected(live, axis, source_P.to(live.device))
    shape = list(live.shape)
    shape[axis] = len(source_P)
    copied = (source_P != NEW).nonzero().flatten()
    padded = empty(tuple(shape), live.dtype)
    if len(copied) < len(source_P):
        padded.zero_()
    return copy_channels(live, source_P[copied], padded, copied, axis=axis)


def selected(live: "torch.Tensor", axis: int, source_P: "torch.Tensor") -> "torch.Tensor":
    """Return the padded channels as :func:`placed` does, on the device of both tensors."""
    padded = live.index_select(axis, source_P.clamp(min=0))
    return padded.masked_fill_(_along(axis, padded, source_P == NEW), 0)


def divided(live: "torch.Tensor", axis: int, source_P: "torch.Tensor") -> "torch.Tensor":
    """Return the padded channels such that the parts of a split one sum to the live one, exactly in its own dtype.

    Each part is half of the rest that the parts before it left, and the last part is the whole rest: for normal numbers
    again a half, for subnormal ones the half plus the rounding error.
    """
    import torch

    padded, source_P = placed(live, axis, source_P), source_P.to(live.device)
    order_P, last_P = _parts(source_P)
    split = ((order_P > 0) | ~last_P).nonzero().flatten()
    parts = padded.index_select(axis, split)
    order, last = (_along(axis, parts, of_P[split]) for of_P in (order_P, last_P))
    for step in range(int(order.max()) if len(split) else 0):
        half = parts / 2
        rest = torch.where(half + half == parts, half, parts - half)
        parts = torch.where(order > step, rest, torch.where((order == step) & ~last, half, parts))
    return padded.index_copy_(axis, split, parts)


def gathered(padded: "torch.Tensor", axis: int, source_P: "torch.Tensor") -> "torch.Tensor":
    """Return the live channels: the inverse of :func:`placed`."""
    return padded.index_select(axis, first_positions(source_P))


def summed(padded: "torch.Tensor", axis: int, source_P: "torch.Tensor") -> "torch.Tensor":
    """Return the live channels, each summed from its last part to its first: the inverse of :func:`divided`."""
    import torch

    order_P, last_P = _parts(source_P)
    ends = (last_P & (source_P != NEW)).nonzero().flatten()
    live = padded.index_select(axis, ends)
    for back in range(1, int(order_P.max()) + 1 if len(ends) else 1):
        has_part = _along(axis, live, order_P[ends] >= back)
        live = torch.where(has_part, padded.index_select(axis, (ends - back).clamp(min=0)) + live, live)
    return live


def first_positions(source_P: "torch.Tensor") -> "torch.Tensor":
    """Return the position of each live channel, or of its first part: int64, strictly increasing."""
    order_P, _ = _parts(source_P)
    return ((order_P == 0) & (source_P != NEW)).nonzero().flatten()


def _parts(source_P: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """Return the index of each padded channel among the parts of its live one (0, 1, ...), and whether it is last."""
    import torch

    index_P = torch.arange(len(source_P), device=source_P.device)
    starts_P = torch.ones(len(source_P), dtype=torch.bool, device=source_P.device)
    starts_P[1:] = (source_P[1:] != source_P[:-1]) | (source_P[1:] == NEW)
    order_P = index_P - torch.where(starts_P, index_P, 0).cummax(dim=0).values
    return order_P, torch.cat([starts_P[1:], starts_P.new_ones(min(1, len(starts_P)))])


def _along(axis: int, tensor: "torch.Tensor", values: "torch.Tensor") -> "torch.Tensor":
    """Return one value per channel in a shape that broadcasts along ``axis``."""
    return values.reshape([-1 if dim == axis else 1 for dim in range(tensor.dim())])
