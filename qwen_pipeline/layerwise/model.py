"""A model whose layers are read and built one by one, and the device and dtype that it computes with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from qwen_pipeline.checkpoint.buffers import BLOCK_BYTES, return_freed_blocks
from qwen_pipeline.checkpoint.digest import block_ranges
from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.layerwise.input_rounding import with_rounded_inputs
from qwen_pipeline.layerwise.meta_model import MetaModel
from qwen_pipeline.layerwise.prefetch import Prefetcher
from qwen_pipeline.layerwise.weights import READERS, HostTensors, ModelWeights, ModuleWeights, Take, fill, pipelined

SHARE_OF_GPU = 0.25
"""Hidden states stay on a GPU if they take at most this share of its free memory, else in pinned host memory."""
SHARE_AHEAD_ON_HOST, SHARE_AHEAD_ON_GPU = 1 / 4, 1 / 2
"""Share of a layer's size that is read ahead of the following layers while it computes.

On the host, reading shares memory and cores with the computation, which takes far longer: a quarter is enough.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeContext:
    """The device and the dtype that models compute with."""

    device: torch.device
    dtype: torch.dtype

    def offload(self, tensor: Tensor, *, copies: int) -> Tensor:
        """Return a tensor on the device if ``copies`` tensors of its size fit there, else in pinned host memory."""
        if self.device.type == "cpu" or copies * tensor.nbytes <= SHARE_OF_GPU * torch.cuda.mem_get_info()[0]:
            return tensor
        return tensor.cpu().pin_memory()

    def fetch(self, tensor: Tensor) -> Tensor:
        """Return a tensor that was possibly offloaded, on the device."""
        return tensor.to(self.device, non_blocking=True)

    @property
    def has_own_memory(self) -> bool:
        """True if the device has memory of its own, which can be filled while it computes."""
        return self.device.type == "cuda"

    def load_each(self, tensors: Sequence[LazyTensor]) -> Iterator[Tensor]:
        """Yield small weights on the device and in the dtype; the next ones are read meanwhile."""
        if self.has_own_memory:
            with Prefetcher(tensors, self.device, budget=2 * READERS * BLOCK_BYTES) as prefetched:
                yield from map(self._as_computed, prefetched)
        else:
            yield from pipelined([(partial(tensor.read, 0, tensor.spec.rows), self._as_computed) for tensor in tensors])

    def _as_computed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)


class LayeredModel:
    """A model whose layers are read and built one by one.

    Args:
        checkpoint: Full precision, GPTQ codes or 8-bit floats, of any Qwen family.
        context: Device and dtype of the computation.

    Attributes:
        kept: The stored tensors of the layer that was built last, by name, if they are to be kept; else None.
        take: Returns stored tensors by name where they are in memory already; None if they are read.

    Raises:
        CheckpointRefused: A tensor that the model needs is missing or has another shape.
    """

    def __init__(self, checkpoint: Checkpoint, context: ComputeContext) -> None:
        return_freed_blocks()
        self.kept: dict[str, Tensor] | None = None
        self.take: Take | None = None
        self.context, self.weights = context, ModelWeights.of(checkpoint)
        self.meta_model = MetaModel(self.weights, device=context.device, dtype=context.dtype)
        self.parts = [self.weights.part(f"layers.{i}", layer) for i, layer in enumerate(self.meta_model.layers)]

    def build(self, layer: int, take: Take) -> nn.Module:
        """Return a callable layer; ``take`` is called for its stored tensors, in the order of its part."""
        if self.kept is not None:
            self.kept = {}
            take = _keeping(take, self.kept)
        parameters = self.parts[layer].assemble(take, device=self.context.device, dtype=self.context.dtype)
        return with_rounded_inputs(fill(self.meta_model.layers[layer], parameters), self.parts[layer].rounded_inputs)

    def pop_kept(self) -> dict[str, Tensor]:
        """Return the stored tensors of the layer that was built last, which are not kept any longer."""
        kept, self.kept = self.kept or {}, {}
        return kept

    def iter_layers(self, first: int = 0, *, ahead_on_gpu: float = SHARE_AHEAD_ON_GPU) -> Iterator[nn.Module]:
        """Yield the layers from ``first`` on; while one computes, the following ones are read."""
        return iter_modules([(self, layer) for layer in range(first, len(self.parts))], ahead_on_gpu=ahead_on_gpu)

    def head_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the output head in blocks of rows [V, H], each with the number of its first row.

        While a block computes, the next one is read.
        """
        head = self.weights.checkpoint.tensors[self.weights.head]
        ranges = list(block_ranges(head.spec))
        rows = self.context.load_each([head.part(*rows_of) for rows_of in ranges])
        return zip((start for start, _ in ranges), rows, strict=True)


def iter_modules(
    steps: Sequence[tuple[LayeredModel, int]], *, ahead_on_gpu: float = SHARE_AHEAD_ON_GPU
) -> Iterator[nn.Module]:
    """Yield layers of models that share a context; while one computes, the following ones are read.

    No reference to a yielded layer is kept here, so its memory is freed when the caller drops it.

    Args:
        steps: A model and the number of one of its layers.
        ahead_on_gpu: Memory on a GPU for reading ahead, as a share of the size of the largest layer in the dtype of
            the computation.
    """
    if not any(model.context.has_own_memory for model, _ in steps):
        yield from pipelined([_on_host(model, layer) for model, layer in steps])
        return
    budget = max(model.parts[layer].numel for model, layer in steps) * steps[0][0].context.dtype.itemsize * ahead_on_gpu
    parts = [model.parts[layer] for model, layer in steps if not model.take]
    tensors = [part.checkpoint.tensors[name] for part in parts for name in part.stored]
    with Prefetcher(tensors, steps[0][0].context.device, budget=int(budget)) as prefetched:
        for model, layer in steps:
            yield model.build(layer, model.take or _in_order(prefetched, model.parts[layer]))


def _on_host(model: LayeredModel, layer: int) -> tuple[Callable[[], HostTensors], Callable[[HostTensors], nn.Module]]:
    """Return a function that reads the beginning of a layer, and one that reads the rest of it and builds it."""
    part = model.parts[layer]
    budget = int(part.numel * model.context.dtype.itemsize * SHARE_AHEAD_ON_HOST)
    return partial(part.read, budget=budget), lambda stored: model.build(layer, part.taking(stored))


def _keeping(take: Take, kept: dict[str, Tensor]) -> Take:
    def taken(name: str) -> Tensor:
        kept[name] = take(name)
        return kept[name]

    return taken


def _in_order(prefetched: Prefetcher, part: ModuleWeights) -> Take:
    expected = iter(part.stored)

    def take(name: str) -> Tensor:
        assert name == next(expected), f"{name} is not the next tensor of the weight converters"
        return next(prefetched)

    return take
