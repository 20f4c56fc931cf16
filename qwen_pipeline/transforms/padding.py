"""Widening every MLP with zero channels, changing no output: silu(0) * 0 = 0 meets zero columns in ``down_proj``."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qwen_pipeline.checkpoint.buffers import empty
from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.qwen.families import require_mlp_tensors
from qwen_pipeline.qwen.geometry import PaddedSize, PadPlan
from qwen_pipeline.transforms.strided import copy_channels

if TYPE_CHECKING:
    import torch


def pad(checkpoint: Checkpoint, plan: PadPlan) -> Checkpoint:
    """Return the checkpoint with every planned size padded, in the weights and in the config.

    The source is https://qwen.readthedocs.io, "GPTQ", troubleshooting; its 29568 -> 29696 is reproduced bit for bit.

    Raises:
        CheckpointRefused: The MLP weights do not have the live width.
    """
    for size in plan.sizes:
        axes = require_mlp_tensors(checkpoint, size.live)
        if size.zeros:
            positions = size.positions()
            tensors = {
                name: _padded(checkpoint.tensors[name], axis, size.padded, positions) for name, axis in axes.items()
            }
            checkpoint = checkpoint.replace(tensors=tensors, config=padded_config(checkpoint.config, size))
    return checkpoint


def padded_config(config: Mapping[str, Any], size: PaddedSize) -> dict[str, Any]:
    """Return the config with one size changed wherever it is written, and nothing else."""
    changed = dict(config)
    for place in size.places:
        part, _, field = place.rpartition(".")
        if part:
            changed[part] = {**changed[part], field: size.padded}
        else:
            changed[field] = size.padded
    return changed


def _padded(tensor: LazyTensor, axis: int, width: int, positions: "torch.Tensor") -> LazyTensor:
    """Return the tensor with ``width`` channels along ``axis``: its own at ``positions``, zeros elsewhere."""
    import torch

    shape = list(tensor.spec.shape)
    shape[axis] = width
    spec = replace(tensor.spec, shape=tuple(shape))

    def read_rows(start: int, stop: int) -> "torch.Tensor":
        first, last = (int(n) for n in torch.searchsorted(positions, torch.tensor([start, stop])))
        block = empty((stop - start, *shape[1:]), spec.torch_dtype).zero_()
        live = torch.arange(last - first)
        return copy_channels(tensor.read(first, last), live, block, positions[first:last] - start, axis=0)

    def read_columns(start: int, stop: int) -> "torch.Tensor":
        block = empty((stop - start, *shape[1:]), spec.torch_dtype).zero_()
        return copy_channels(tensor.read(start, stop), torch.arange(len(positions)), block, positions, axis=1)

    return LazyTensor(spec=spec, read=read_rows if axis == 0 else read_columns)
