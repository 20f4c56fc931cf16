"""Tensors whose values are spread over the files of several ranks: as flat runs one after the other, or as chunks."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.buffers import empty
from qwen_pipeline.checkpoint.lazy import LazyTensor
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.checkpoint.trainers.torch_file import StoredView

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Run:
    """Elements ``start:stop`` of a contiguous view, flattened."""

    view: StoredView
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A block of a tensor that begins at ``offsets``."""

    view: StoredView
    offsets: tuple[int, ...]


def joined(spec: TensorSpec, runs: Sequence[Run]) -> LazyTensor:
    """Return the tensor whose flattened values are those of the runs, in their order."""
    assert sum(run.stop - run.start for run in runs) == prod(spec.shape), f"{runs} are not {spec}"
    width = prod(spec.shape[1:])

    def read(start: int, stop: int) -> "torch.Tensor":
        block = empty((stop - start, *spec.shape[1:]) if spec.shape else (), spec.torch_dtype)
        flat, first, last = block.reshape(-1), start * width, stop * width
        at = 0
        for run in runs:
            length = run.stop - run.start
            low, high = max(first, at), min(last, at + length)
            if low < high:
                flat[low - first : high - first] = run.view.load_elements(run.start + low - at, run.start + high - at)
            at += length
        return block

    return LazyTensor(spec=spec, read=read)


def assembled(spec: TensorSpec, chunks: Sequence[Chunk]) -> LazyTensor:
    """Return the tensor that disjoint chunks make up."""

    def read(start: int, stop: int) -> "torch.Tensor":
        if not spec.shape:
            return chunks[0].view.load(start, stop)
        block = empty((stop - start, *spec.shape[1:]), spec.torch_dtype)
        for chunk in chunks:
            at, shape = chunk.offsets[0], chunk.view.spec.shape
            low, high = max(start, at), min(stop, at + shape[0])
            if low < high:
                inner = [slice(o, o + n) for o, n in zip(chunk.offsets[1:], shape[1:], strict=True)]
                block[(slice(low - start, high - start), *inner)] = chunk.view.load(low - at, high - at)
        return block

    return LazyTensor(spec=spec, read=read)


def obstacle_of(spec: TensorSpec, chunks: Sequence[Chunk]) -> str | None:
    """Return the reason why chunks do not make up a tensor exactly once, or None."""
    boxes = [[(o, o + n) for o, n in zip(c.offsets, c.view.spec.shape, strict=True)] for c in chunks]
    if any(high > length for box in boxes for (_, high), length in zip(box, spec.shape, strict=True)):
        return f"a chunk lies outside of its shape {list(spec.shape)}"
    covered = sum(prod(chunk.view.spec.shape) for chunk in chunks)
    if covered != prod(spec.shape):
        return f"its chunks have {covered:,} of {prod(spec.shape):,} values"
    for number, box in enumerate(boxes):
        for other in boxes[:number]:
            if all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(box, other, strict=True)):
                return "two of its chunks overlap"
    return None
