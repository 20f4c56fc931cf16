"""A model whose layers are read and built one by one, and where it computes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from qwen_pipeline.checkpoint.buffers import BLOCK_BYTES, return_freed_blocks
from qwen_pipeline.checkpoint.digest import block_ranges
from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.layerwise.meta_model import MetaModel
from qwen_pipeline.layerwise.prefetch import Prefetcher
from qwen_pipeline.layerwise.weights import READERS, HostTensors, ModelWeights, ModuleWeights, Take, ahead, fill

SHARE_OF_GPU = 0.25
"""Hidden states stay on a GPU while they take at most this share of its free memory, else in pinned host memory."""
SHARE_AHEAD_ON_HOST, SHARE_AHEAD_ON_GPU = 1 / 4, 1 / 2
"""Of a layer, what is read of those that follow while it computes.

The host shares its memory and its cores with what computes, which takes far longer than to read: a quarter is enough.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeContext:
    """Where models compute, and in what."""

    device: torch.device
    dtype: torch.dtype

    def shelve(self, tensor: Tensor, *, copies: int) -> Tensor:
        """Return a tensor where it and others of its size, ``copies`` in all, can wait for their next layer."""
        if self.device.type == "cpu" or copies * tensor.nbytes <= SHARE_OF_GPU * torch.cuda.mem_get_info()[0]:
            return tensor
        return tensor.cpu().pin_memory()

    def fetch(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    @property
    def is_apart(self) -> bool:
        """Whether it has memory of its own, which is read into while it computes."""
        return self.device.type == "cuda"

    def bring(self, tensors: Sequence[LazyTensor]) -> Iterator[Tensor]:
        """Yield weights where and in what they are computed with, small ones; the next ones are read meanwhile."""
        if self.is_apart:
            with Prefetcher(tensors, self.device, room=2 * READERS * BLOCK_BYTES) as feed:
                yield from map(self._as_computed, feed)
        else:
            yield from ahead([(partial(tensor.read, 0, tensor.spec.rows), self._as_computed) for tensor in tensors])

    def _as_computed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)


class LayeredModel:
    """A model whose layers are read and built one by one.

    Args:
        checkpoint: Full precision or GPTQ codes, of any Qwen family.
        context: Where to compute.

    Raises:
        CheckpointRefused: A tensor that the model needs is missing or has another shape.
    """

    def __init__(self, checkpoint: Checkpoint, context: ComputeContext) -> None:
        return_freed_blocks()
        self.context, self.weights = context, ModelWeights.of(checkpoint)
        self.meta_model = MetaModel(self.weights, device=context.device, dtype=context.dtype)
        self.parts = [self.weights.part(f"layers.{i}", layer) for i, layer in enumerate(self.meta_model.layers)]

    def build(self, layer: int, take: Take) -> nn.Module:
        """Return a layer that can be called, of stored tensors that are taken in the order of its part."""
        parameters = self.parts[layer].assemble(take, device=self.context.device, dtype=self.context.dtype)
        return fill(self.meta_model.layers[layer], parameters)

    def coming(self, first: int = 0, *, ahead_on_gpu: float = SHARE_AHEAD_ON_GPU) -> Iterator[nn.Module]:
        """Yield the layers from ``first`` on; while one computes, what follows is read."""
        return modules([(self, layer) for layer in range(first, len(self.parts))], ahead_on_gpu=ahead_on_gpu)

    def head_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the output head in blocks of rows [V, H], with the number of its first; meanwhile the next is read."""
        head = self.weights.checkpoint.tensors[self.weights.head]
        ranges = list(block_ranges(head.spec))
        rows = self.context.bring([head.part(*ends) for ends in ranges])
        return zip((start for start, _ in ranges), rows, strict=True)


def modules(
    steps: Sequence[tuple[LayeredModel, int]], *, ahead_on_gpu: float = SHARE_AHEAD_ON_GPU
) -> Iterator[nn.Module]:
    """Yield layers of models that compute in one place; while one computes, what follows is read.

    Nothing that was yielded is kept here, so that it is gone when the receiver drops it.

    Args:
        steps: A model and the number of one of its layers.
        ahead_on_gpu: How much of a layer may wait on a GPU: of the largest one, in what is computed in.
    """
    if not any(model.context.is_apart for model, _ in steps):
        yield from ahead([_on_host(model, layer) for model, layer in steps])
        return
    parts = [model.parts[layer] for model, layer in steps]
    room = max(part.numel for part in parts) * steps[0][0].context.dtype.itemsize * ahead_on_gpu
    tensors = [part.checkpoint.tensors[name] for part in parts for name in part.stored]
    with Prefetcher(tensors, steps[0][0].context.device, room=int(room)) as feed:
        for model, layer in steps:
            yield model.build(layer, _in_order(feed, model.parts[layer]))


def _on_host(model: LayeredModel, layer: int) -> tuple[Callable[[], HostTensors], Callable[[HostTensors], nn.Module]]:
    """Return what reads the beginning of a layer, and what reads the rest of it and builds it."""
    part = model.parts[layer]
    room = int(part.numel * model.context.dtype.itemsize * SHARE_AHEAD_ON_HOST)
    return partial(part.read, room=room), lambda stored: model.build(layer, part.taking(stored))


def _in_order(feed: Prefetcher, part: ModuleWeights) -> Take:
    expected = iter(part.stored)

    def take(name: str) -> Tensor:
        assert name == next(expected), f"{name} is not what a recipe said it would take"
        return next(feed)

    return take
