"""Memory for blocks, used again: the kernel takes longer to hand out a fresh page than a block's arithmetic takes.

On a thread that :func:`recycling` runs on, a block's memory goes back to the pool as soon as nothing refers to it.
Anywhere else :func:`empty` is plain fresh memory.
"""

import ctypes
import threading
import weakref
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cache
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 8 * 2**20
"""Bytes of one block of rows: the unit in which tensors are read, computed, hashed and written."""
_M_MMAP_THRESHOLD = -3
"""``malloc.h``"""


class BufferPool:
    """Buffers of :data:`BLOCK_BYTES` each, as many as were ever in use at once.

    Args:
        page_locked: A GPU may copy from them while everything else goes on: whoever has it do so keeps the block until
            it is done. To lock a page takes longer than to fill it, and is done once for each buffer.
    """

    def __init__(self, *, page_locked: bool = False) -> None:
        give_blocks_back_when_freed()
        self._page_locked = page_locked
        self._spare: list[torch.Tensor] = []

    def take(self, nbytes: int) -> "torch.Tensor":
        """Return ``nbytes`` of uninitialised memory as uint8; larger than a block, it is not used again."""
        import torch

        if nbytes > BLOCK_BYTES:
            return torch.empty(nbytes, dtype=torch.uint8)
        try:
            buffer = self._spare.pop()
        except IndexError:
            buffer = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=self._page_locked)
        lent = buffer.numpy()[:nbytes]
        weakref.finalize(lent, self._spare.append, buffer).atexit = False
        return torch.from_numpy(lent)


class _Thread(threading.local):
    pool: BufferPool | None = None


_thread = _Thread()


@contextmanager
def recycling(pool: BufferPool) -> Generator[None, None, None]:
    """Take this thread's blocks from a pool within the body."""
    _thread.pool = pool
    try:
        yield
    finally:
        _thread.pool = None


def empty(shape: tuple[int, ...], dtype: "torch.dtype") -> "torch.Tensor":
    """Return uninitialised memory for a block."""
    import torch

    nbytes = prod(shape) * dtype.itemsize
    if _thread.pool is None or not nbytes:
        return torch.empty(shape, dtype=dtype)
    return _thread.pool.take(nbytes).view(dtype).reshape(shape)


@cache
def give_blocks_back_when_freed() -> None:
    """Have glibc map each block by itself, so that the kernel has it back once it is freed.

    Otherwise glibc raises its threshold with the first blocks, keeps later ones on a heap that fragments, and the peak
    is a matter of luck. Other C libraries have no such knob.
    """
    with suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)
