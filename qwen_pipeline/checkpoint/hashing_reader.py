"""Digesting a checkpoint while it is read for something else, so that its bytes move once."""

import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.digest import PassingTensor, Seen, SeenTensor, read_tensors
from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.progress import Observe, unobserved

if TYPE_CHECKING:
    import torch


class HashingReader:
    """Sees what passes on its way from one checkpoint to whatever is made of it.

    Args:
        name: What it is called in a journal.
        source: What passes.
        looks: Whether to look for what is not finite, too.

    Attributes:
        checkpoint: The same checkpoint; its rows are seen as they are read.
    """

    def __init__(self, name: str, source: Checkpoint, *, looks: bool = True) -> None:
        self.name = name
        self._source = source
        self._passing = {name: PassingTensor(spec, looks=looks) for name, spec in source.items()}
        self._seen: dict[str, SeenTensor] = {}
        self.checkpoint = source.replace(
            tensors={name: self._tapped(name, tensor) for name, tensor in source.tensors.items()}
        )

    def leave_to(self, output: Checkpoint) -> None:
        """See nothing of the tensors that an output has as they are: they are seen when they are written."""
        for name, tensor in output.tensors.items():
            if self._is_own(name, tensor):
                self._passing.pop(name, None)

    def recall(self, name: str, seen: SeenTensor) -> None:
        """Take over what was seen in an earlier attempt."""
        self._seen[name] = seen

    def note(self, name: str) -> SeenTensor | None:
        """Return what was seen of a tensor, if every byte of it passed."""
        return self._seen.get(name) or (passing.seen if (passing := self._passing.get(name)) else None)

    @property
    def seen(self) -> Seen:
        """Every tensor, once the tap is settled."""
        return {name: self._seen[name] for name in self._source}

    def settle(self, output: Checkpoint, written: Seen, *, task: str, observe: Observe = unobserved) -> None:
        """Complete what was seen: by what the output has unchanged, and by reading what did not pass at all."""
        self._seen |= {name: seen for name in self._source if (seen := self.note(name))}
        self._seen |= {name: written[name] for name, tensor in output.tensors.items() if self._is_own(name, tensor)}
        if missing := [name for name in self._source if name not in self._seen]:
            self._seen |= read_tensors(self._source, missing, task=task, observe=observe)

    def _is_own(self, name: str, tensor: LazyTensor) -> bool:
        own = self.checkpoint.tensors.get(name)
        return own is not None and (tensor is own or (own.stored is not None and tensor.stored is own.stored))

    def _tapped(self, name: str, tensor: LazyTensor) -> LazyTensor:
        def read(start: int, stop: int) -> "torch.Tensor":
            rows = tensor.read(start, stop)
            if not _thread.looks_aside and (passing := self._passing.get(name)):
                passing.see(start * tensor.spec.row_bytes, rows)
            return rows

        return replace(tensor, read=read)


class _Thread(threading.local):
    looks_aside = False


_thread = _Thread()


@contextmanager
def looking_aside() -> Generator[None, None, None]:
    """Within the body this thread reads parts of tensors out of order, which no tap is to see."""
    _thread.looks_aside = True
    try:
        yield
    finally:
        _thread.looks_aside = False
