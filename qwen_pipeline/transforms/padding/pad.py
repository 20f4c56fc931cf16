"""Widening every MLP so that ranks can share it in whole groups, and narrowing it again; its function stays the same.

New channels are zeros (``silu(0) * 0`` meets a zero column of ``down_proj``), or they are parts of live channels, which
then read the same and share what they give (:mod:`~qwen_pipeline.transforms.padding.channel_maps`).
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
from qwen_pipeline.transforms.padding.splitting import gives_output, owner_of, split_map

if TYPE_CHECKING:
    import torch

    Put = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]


def pad(checkpoint: Checkpoint, plan: PadPlan) -> Checkpoint:
    """Return the checkpoint with every planned size padded, in the weights and in the config.

    The source is https://qwen.readthedocs.io, "GPTQ", troubleshooting; its 29568 -> 29696 is reproduced bit for bit.

    Raises:
        CheckpointRefused: The MLP weights do not have the live width.
    """
    return _resized(checkpoint, plan, _padded, lambda size: size.padded)


def unpad(checkpoint: Checkpoint, plan: PadPlan) -> Checkpoint:
    """Return the checkpoint that :func:`pad` was given, bit for bit.

    Raises:
        CheckpointRefused: The MLP weights do not have the padded width; or, from a read, padding the result again
            would not give the checkpoint, because the channels that padding added were changed since.
    """
    return _resized(checkpoint, plan, _unpadded, lambda size: size.live)


def narrowed(checkpoint: Checkpoint, plan: PadPlan) -> Checkpoint:
    """Do as :func:`unpad`, whatever became of the channels that padding added: they are left out, or added up."""
    return _resized(checkpoint, plan, partial(_unpadded, is_checked=False), lambda size: size.live)


def changed_channels(name: str, tensor: LazyTensor, at: Channels, size: PaddedSize) -> "torch.Tensor":
    """Return which channels of a gate or an up are neither zeros nor the live channel again, where padding made them.

    Only blocks that padding added channels to are read. The result is bool [halves, P]; of a stack [halves, E, P].
    """
    import torch

    source = source_map(size, name)
    if at.axis:
        blocks: list[torch.Tensor] = []
        for start, stop in block_ranges(tensor.spec):
            padded, rows = tensor.read(start, stop), _rows_of(source, start, stop)
            again = _mapped(placed, _mapped(gathered, padded, at, rows), at, rows)
            blocks.append((again != padded).any(dim=3 - at.axis))
        return torch.cat(blocks).unflatten(1, (at.halves, size.padded)).transpose(0, 1)
    changed_P = torch.zeros(size.padded, dtype=torch.bool)
    for start, stop in block_ranges(_widened(tensor.spec, at, size.live)):
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
        return split_map(size, owner_of(name))
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
            tensors = {name: resize(name, checkpoint.tensors[name], at, size) for name, at in sized.items()}
            config = resized_config(checkpoint.config, size, width(size))
            checkpoint = checkpoint.replace(tensors=tensors, config=config)
    return checkpoint


def _padded(name: str, tensor: LazyTensor, at: Channels, size: PaddedSize) -> LazyTensor:
    put = divided if gives_output(name) else placed

    def read_rows(start: int, stop: int) -> "torch.Tensor":
        wanted = source_map(size, name)[start:stop]
        held = wanted[wanted != NEW]
        first, last = (int(held[0]), int(held[-1])) if len(held) else (0, -1)
        return placed(tensor.read(first, last + 1), 0, _counted_from(first, wanted))

    def read(start: int, stop: int) -> "torch.Tensor":
        return _mapped(put, tensor.read(start, stop), at, _rows_of(source_map(size, name), start, stop))

    return LazyTensor(spec=_widened(tensor.spec, at, size.padded), read=read if at.axis else read_rows)


def _unpadded(name: str, tensor: LazyTensor, at: Channels, size: PaddedSize, *, is_checked: bool = True) -> LazyTensor:
    source = source_map(size, name)
    put, take = (divided, summed) if gives_output(name) else (placed, gathered)

    def read_rows(start: int, stop: int) -> "torch.Tensor":
        first, last, rows = _padded_rows(source, start, stop)
        padded = tensor.read(first, last)
        live = gathered(padded, 0, rows)
        if is_checked:
            _require_same(name, placed(live, 0, rows), padded)
        return live

    def read(start: int, stop: int) -> "torch.Tensor":
        padded, rows = tensor.read(start, stop), _rows_of(source, start, stop)
        live = _mapped(take, padded, at, rows)
        if is_checked:
            _require_same(name, _mapped(put, live, at, rows), padded)
        return live

    return LazyTensor(spec=_widened(tensor.spec, at, size.live), read=read if at.axis else read_rows)


def _mapped(put: "Put", block: "torch.Tensor", at: Channels, source: "torch.Tensor") -> "torch.Tensor":
    """Apply a map of channels to each half of the axis, and to each expert its own."""
    import torch

    if source.dim() == 2:
        of_expert = replace(at, axis=at.axis - 1)
        return torch.stack([_mapped(put, one, of_expert, row) for one, row in zip(block, source, strict=True)])
    if at.halves == 1:
        return put(block, at.axis, source)
    return torch.cat([put(half, at.axis, source) for half in block.chunk(at.halves, dim=at.axis)], dim=at.axis)


def _padded_rows(source_P: "torch.Tensor", start: int, stop: int) -> "tuple[int, int, torch.Tensor]":
    """Return the padded rows that live rows ``start:stop`` became: the first, the one after the last, and their map."""
    bounds = [0, *first_positions(source_P)[1:].tolist(), len(source_P)]
    return bounds[start], bounds[stop], _counted_from(start, source_P[bounds[start] : bounds[stop]])


def _rows_of(source: "torch.Tensor", start: int, stop: int) -> "torch.Tensor":
    return source[start:stop] if source.dim() == 2 else source


def _counted_from(first: int, source_P: "torch.Tensor") -> "torch.Tensor":
    import torch

    return torch.where(source_P == NEW, NEW, source_P - first)


def _widened(spec: TensorSpec, at: Channels, width: int) -> TensorSpec:
    shape = list(spec.shape)
    shape[at.axis] = at.halves * width
    return replace(spec, shape=tuple(shape))


def _require_same(name: str, again: "torch.Tensor", padded: "torch.Tensor") -> None:
    import torch

    if not torch.equal(again, padded):
        raise CheckpointRefused(
            f"{name} is no longer what padding made: the channels that it added have weights of their own.",
            remedy="Unpad only what the stage pad wrote. What was trained after padding uses the new channels, so it"
            " has to stay padded.",
        )
