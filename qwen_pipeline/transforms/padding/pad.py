"""Padding of every MLP to a width that ranks can share in whole groups, and its reverse; the model's function is kept.

New channels are zeros (``silu(0) * 0``, and a zero column of ``down_proj``), or parts of live channels, which have the
same inputs and split the output (:mod:`~qwen_pipeline.transforms.padding.channel_maps`).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.digest import block_ranges
from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.qwen.channels import Channels, sized_tensors
from qwen_pipeline.qwen.geometry import PaddedSize, PadPlan, resized_config
from qwen_pipeline.transforms.padding.channel_maps import NEW, divided, first_positions, gathered, placed, summed
from qwen_pipeline.transforms.padding.splitting import is_down_projection, mlp_module, split_map

if TYPE_CHECKING:
    import torch

    ChannelOp = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]
    """Applies a map of channels, or undoes it: (tensor, axis, map) -> tensor."""


def pad(checkpoint: Checkpoint, plan: PadPlan) -> Checkpoint:
    """Return the checkpoint with every planned size padded, in the weights and in the config.

    The procedure is that of https://qwen.readthedocs.io, "GPTQ", troubleshooting; its example, 29568 -> 29696, is
    reproduced bit for bit.

    Raises:
        CheckpointRefused: The MLP weights do not have the live width.
    """
    return _resized(checkpoint, plan, _padded, lambda size: size.padded)


def unpad(checkpoint: Checkpoint, plan: PadPlan) -> Checkpoint:
    """Return the checkpoint before :func:`pad`, bit for bit.

    Raises:
        CheckpointRefused: The MLP weights do not have the padded width. Reads raise it if the channels that padding
            added were changed since, so that padding the result again would not give this checkpoint.
    """
    return _resized(checkpoint, plan, _unpadded, lambda size: size.live)


def narrowed(checkpoint: Checkpoint, plan: PadPlan) -> Checkpoint:
    """Return the checkpoint at the live width without checking the added channels, which are dropped or summed."""
    return _resized(checkpoint, plan, partial(_unpadded, is_checked=False), lambda size: size.live)


def changed_channels(name: str, tensor: LazyTensor, channels: Channels, size: PaddedSize) -> "torch.Tensor":
    """Return the added channels of a gate or up projection that are no longer zero or a copy of the live channel.

    Only blocks to which padding added channels are read. The result is bool [halves, P], of a stack [halves, E, P].
    """
    import torch

    source = source_map(size, name)
    if channels.axis:
        blocks: list[torch.Tensor] = []
        for start, stop in block_ranges(tensor.spec):
            padded, rows = tensor.read(start, stop), _rows_of(source, start, stop)
            again = _mapped(placed, _mapped(gathered, padded, channels, rows), channels, rows)
            blocks.append((again != padded).any(dim=3 - channels.axis))
        return torch.cat(blocks).unflatten(1, (channels.halves, size.padded)).transpose(0, 1)
    changed_P = torch.zeros(size.padded, dtype=torch.bool)
    for start, stop in block_ranges(_resized_spec(tensor.spec, channels, size.live)):
        first, last, rows = _padded_rows(source, start, stop)
        if last - first > stop - start:
            padded = tensor.read(first, last)
            again = placed(gathered(padded, 0, rows), 0, rows)
            changed_P[first:last] = (again != padded).flatten(1).any(dim=1) if padded.dim() > 1 else again != padded
    return changed_P.unsqueeze(0)


def source_map(size: PaddedSize, name: str) -> "torch.Tensor":
    """Return the map of a tensor's channels, int64 [P]; [E, P] if the experts of a stack have maps of their own."""
    import torch

    if size.layout == "split":
        return split_map(size, mlp_module(name))
    return torch.full((size.padded,), NEW).index_copy_(0, size.positions(), torch.arange(size.live))


def _resized(
    checkpoint: Checkpoint,
    plan: PadPlan,
    resize: "Callable[[str, LazyTensor, Channels, PaddedSize], LazyTensor]",
    width: Callable[[PaddedSize], int],
) -> Checkpoint:
    for size in plan.sizes:
        sized = sized_tensors(checkpoint, size.field)
        if size.zeros:
            tensors = {name: resize(name, checkpoint.tensors[name], channels, size) for name, channels in sized.items()}
            config = resized_config(checkpoint.config, size, width(size))
            checkpoint = checkpoint.replace(tensors=tensors, config=config)
    return checkpoint


def _padded(name: str, tensor: LazyTensor, channels: Channels, size: PaddedSize) -> LazyTensor:
    apply = divided if is_down_projection(name) else placed

    def read_rows(start: int, stop: int) -> "torch.Tensor":
        sources = source_map(size, name)[start:stop]
        live = sources[sources != NEW]
        first, last = (int(live[0]), int(live[-1])) if len(live) else (0, -1)
        return placed(tensor.read(first, last + 1), 0, _counted_from(first, sources))

    def read(start: int, stop: int) -> "torch.Tensor":
        return _mapped(apply, tensor.read(start, stop), channels, _rows_of(source_map(size, name), start, stop))

    return LazyTensor(spec=_resized_spec(tensor.spec, channels, size.padded), read=read if channels.axis else read_rows)


def _unpadded(
    name: str, tensor: LazyTensor, channels: Channels, size: PaddedSize, *, is_checked: bool = True
) -> LazyTensor:
    source = source_map(size, name)
    apply, undo = (divided, summed) if is_down_projection(name) else (placed, gathered)

    def read_rows(start: int, stop: int) -> "torch.Tensor":
        first, last, rows = _padded_rows(source, start, stop)
        padded = tensor.read(first, last)
        live = gathered(padded, 0, rows)
        if is_checked:
            _require_same(name, placed(live, 0, rows), padded)
        return live

    def read(start: int, stop: int) -> "torch.Tensor":
        padded, rows = tensor.read(start, stop), _rows_of(source, start, stop)
        live = _mapped(undo, padded, channels, rows)
        if is_checked:
            _require_same(name, _mapped(apply, live, channels, rows), padded)
        return live

    return LazyTensor(spec=_resized_spec(tensor.spec, channels, size.live), read=read if channels.axis else read_rows)


def _mapped(op: "ChannelOp", block: "torch.Tensor", channels: Channels, source: "torch.Tensor") -> "torch.Tensor":
    """Return a block with a map applied to each half of the channels, or with each expert's map applied to it."""
    import torch

    if source.dim() == 2:
        of_expert = replace(channels, axis=channels.axis - 1)
        return torch.stack([_mapped(op, matrix, of_expert, row) for matrix, row in zip(block, source, strict=True)])
    if channels.halves == 1:
        return op(block, channels.axis, source)
    halves = block.chunk(channels.halves, dim=channels.axis)
    return torch.cat([op(half, channels.axis, source) for half in halves], dim=channels.axis)


def _padded_rows(source_P: "torch.Tensor", start: int, stop: int) -> "tuple[int, int, torch.Tensor]":
    """Return the range of padded rows made from the live rows ``start:stop``, and their map: (first, stop, map)."""
    bounds = [0, *first_positions(source_P)[1:].tolist(), len(source_P)]
    return bounds[start], bounds[stop], _counted_from(start, source_P[bounds[start] : bounds[stop]])


def _rows_of(source: "torch.Tensor", start: int, stop: int) -> "torch.Tensor":
    return source[start:stop] if source.dim() == 2 else source


def _counted_from(first: int, source_P: "torch.Tensor") -> "torch.Tensor":
    """Return a map whose live channels are counted from ``first``."""
    import torch

    return torch.where(source_P == NEW, NEW, source_P - first)


def _resized_spec(spec: TensorSpec, channels: Channels, width: int) -> TensorSpec:
    shape = list(spec.shape)
    shape[channels.axis] = channels.halves * width
    return replace(spec, shape=tuple(shape))


def _require_same(name: str, again: "torch.Tensor", padded: "torch.Tensor") -> None:
    import torch

    if not torch.equal(again, padded):
        raise CheckpointRefused(
            f"{name} was changed after padding: the channels that padding added have other values.",
            remedy="Unpad only checkpoints that the stage pad wrote. A model that was trained after padding uses the"
            " added channels, so keep it padded.",
        )
