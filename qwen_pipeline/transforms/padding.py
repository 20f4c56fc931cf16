"""Widening every MLP with zero channels, changing no output: silu(0) * 0 = 0 meets zero columns in ``down_proj``."""

from dataclasses import replace
from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.buffers import empty
from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.qwen.channels import Channels, sized_tensors
from qwen_pipeline.qwen.geometry import PaddedSize, PadPlan, padded_config
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
        sized = sized_tensors(checkpoint, size.field)
        if size.zeros:
            tensors = {name: _padded(checkpoint.tensors[name], at, size) for name, at in sized.items()}
            checkpoint = checkpoint.replace(tensors=tensors, config=padded_config(checkpoint.config, size))
    return checkpoint


def _padded(tensor: LazyTensor, at: Channels, size: PaddedSize) -> LazyTensor:
    """Return the tensor with its live channels at their padded positions, and zeros elsewhere."""
    import torch

    halves = range(at.halves)
    positions = torch.cat([size.positions() + half * size.padded for half in halves])
    shape = list(tensor.spec.shape)
    shape[at.axis] = size.padded * at.halves
    spec = replace(tensor.spec, shape=tuple(shape))

    def read_rows(start: int, stop: int) -> "torch.Tensor":
        first, last = (int(n) for n in torch.searchsorted(positions, torch.tensor([start, stop])))
        block = empty((stop - start, *shape[1:]), spec.torch_dtype).zero_()
        live = torch.arange(last - first)
        return copy_channels(tensor.read(first, last), live, block, positions[first:last] - start, axis=0)

    def read_columns(start: int, stop: int) -> "torch.Tensor":
        block = empty((stop - start, *shape[1:]), spec.torch_dtype).zero_()
        return copy_channels(tensor.read(start, stop), torch.arange(len(positions)), block, positions, axis=at.axis)

    return LazyTensor(spec=spec, read=read_rows if at.axis == 0 else read_columns)
