"""Reuse of the memory of blocks: the kernel takes longer to provide a new page than the arithmetic on its bytes takes.

Within :func:`recycling`, a block's memory goes back to the thread's pool as soon as nothing refers to it. Elsewhere
:func:`empty` allocates.
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
        page_locked: Whether a GPU can copy from the buffers asynchronously; the caller must keep a block until its copy
            is done. Locking a page takes longer than filling it, and happens once for each buffer.
    """

    def __init__(self, *, page_locked: bool = False) -> None:
        return_freed_blocks()
        self._page_locked = page_locked
        self._spare: list[torch.Tensor] = []

    def take(self, nbytes: int) -> "torch.Tensor":
        """Return ``nbytes`` of uninitialised memory as uint8; memory larger than a block is not reused."""
        import torch

        if nbytes > BLOCK_BYTES:
            return torch.empty(nbytes, dtype=torch.uint8)
        try:
            buffer = self._spare.pop()
        except IndexError:
            buffer = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=self._page_locked)
        view = buffer.numpy()[:nbytes]
        weakref.finalize(view, self._spare.append, buffer).atexit = False
        return torch.from_numpy(view)


class _Thread(threading.local):
    pool: BufferPool | None = None


_thread = _Thread()


@contextmanager
def recycling(pool: BufferPool) -> Generator[None, None, None]:
    """Within the body, take the memory of this thread's blocks from a pool."""
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
def return_freed_blocks() -> None:
    """Make glibc map each block separately, so that freeing it returns its memory to the kernel.

    By default glibc raises its threshold after the first blocks and keeps later ones on a heap that fragments, so the
    peak varies between runs. Other C libraries have no such option.
    """
    with suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)
