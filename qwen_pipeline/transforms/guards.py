"""Checks that ride along with the one pass in which a checkpoint is written, so that none needs a second read."""

from dataclasses import replace
from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.errors import CheckFailed

if TYPE_CHECKING:
    import torch


def guard_finite(checkpoint: Checkpoint, *, remedy: str) -> Checkpoint:
    """Return the same checkpoint, whose reads raise on a NaN or an infinity.

    A shard enters the writer's journal only after all its rows were read, so whatever was written is finite, also
    after a resume.

    Raises:
        CheckFailed: From a read, naming the tensor.
    """
    floating = {
        name: tensor for name, tensor in checkpoint.tensors.items() if tensor.spec.torch_dtype.is_floating_point
    }
    return checkpoint.replace(tensors={name: _guarded(name, tensor, remedy) for name, tensor in floating.items()})


def is_finite(tensor: "torch.Tensor") -> bool:
    """Return whether there is no NaN and no infinity, without a temporary of the tensor's size."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())


def _guarded(name: str, tensor: LazyTensor, remedy: str) -> LazyTensor:
    def read(start: int, stop: int) -> "torch.Tensor":
        rows = tensor.read(start, stop)
        if not is_finite(rows):
            raise CheckFailed(f"{name} has values that are not finite in rows {start} to {stop}.", remedy=remedy)
        return rows

    return replace(tensor, read=read)
