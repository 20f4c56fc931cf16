"""Hashing a checkpoint while it is read for another purpose, so that its bytes are read only once."""

import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.digest import HashedTensor, HashedTensors, TensorHasher, block_ranges, hash_tensors
from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.progress import Observe, unobserved

if TYPE_CHECKING:
    import torch


class HashingReader:
    """Hashes the tensors of a checkpoint as their rows are read.

    Args:
        name: Its name in a journal.
        source: The checkpoint.
        check_finite: Whether to look for NaN and infinities too.

    Attributes:
        checkpoint: The same checkpoint, to be read in place of ``source``.
    """

    def __init__(self, name: str, source: Checkpoint, *, check_finite: bool = True) -> None:
        self.name = name
        self._source = source
        self._hashers = {name: TensorHasher(spec, check_finite=check_finite) for name, spec in source.items()}
        self._results: dict[str, HashedTensor] = {}
        self.checkpoint = source.replace(
            tensors={name: self._hashed_on_read(name, tensor) for name, tensor in source.tensors.items()}
        )

    def skip_unchanged(self, output: Checkpoint) -> None:
        """Skip the tensors that an output contains unchanged, which are hashed when they are written."""
        for name, tensor in output.tensors.items():
            if self._is_unchanged(name, tensor):
                self._hashers.pop(name, None)

    def restore(self, name: str, hashed: HashedTensor) -> None:
        """Use the hash result of an earlier attempt."""
        self._results[name] = hashed

    def result(self, name: str) -> HashedTensor | None:
        """Return the hash result of a tensor, if every byte of it was read."""
        return self._results.get(name) or (hasher.result if (hasher := self._hashers.get(name)) else None)

    @property
    def results(self) -> HashedTensors:
        """The hash result of every tensor, after :meth:`finish`."""
        return {name: self._results[name] for name in self._source}

    def finish(self, output: Checkpoint, written: HashedTensors, *, task: str, observe: Observe = unobserved) -> None:
        """Complete the results: take those of unchanged tensors from the output, and read the remaining tensors.

        Args:
            output: The checkpoint that was computed from this one.
            written: The hash result of every tensor of the output.
            task: Name of the progress.
            observe: Called with the progress.
        """
        self._results |= {name: result for name in self._source if (result := self.result(name))}
        self._results |= {
            name: written[name] for name, tensor in output.tensors.items() if self._is_unchanged(name, tensor)
        }
        missing = {name: tensor for name, tensor in self._source.tensors.items() if name not in self._results}
        if missing:
            self._results |= hash_tensors(missing, task=task, observe=observe)

    def _is_unchanged(self, name: str, tensor: LazyTensor) -> bool:
        source = self.checkpoint.tensors.get(name)
        return source is not None and (
            tensor is source or (source.stored is not None and tensor.stored is source.stored)
        )

    def _hashed_on_read(self, name: str, tensor: LazyTensor) -> LazyTensor:
        def read(start: int, stop: int) -> "torch.Tensor":
            rows = tensor.read(start, stop)
            if not _thread.is_paused and (hasher := self._hashers.get(name)):
                hasher.update(start * tensor.spec.row_bytes, rows)
            return rows

        return replace(tensor, read=read)


class _Thread(threading.local):
    is_paused = False


_thread = _Thread()


@contextmanager
def hashing_paused() -> Generator[None, None, None]:
    """Within the body, do not hash what this thread reads, which are parts of tensors, out of order."""
    _thread.is_paused = True
    try:
        yield
    finally:
        _thread.is_paused = False


def are_equal(a: LazyTensor, b: LazyTensor) -> bool:
    """Return whether two tensors have the same shape and values; dtypes may differ. What is read is not hashed."""
    import torch

    if a.spec.shape != b.spec.shape:
        return False
    wide = torch.promote_types(a.spec.torch_dtype, b.spec.torch_dtype)
    with hashing_paused():
        return all(a.read(*rows).to(wide).equal(b.read(*rows).to(wide)) for rows in block_ranges(a.spec))
