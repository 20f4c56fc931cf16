"""The pages of a file in the page cache, counted without changing it."""

import ctypes
import mmap
from pathlib import Path

import numpy as np


def cached_pages(path: Path) -> int:
    """Return the number of a file's pages in the page cache."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        data = np.frombuffer(mapped, np.uint8)
        resident = np.zeros(-(-len(data) // mmap.PAGESIZE), np.uint8)
        mincore = ctypes.CDLL(None, use_errno=True).mincore
        failed = mincore(
            ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(len(data)), ctypes.c_void_p(resident.ctypes.data)
        )
        del data
    assert not failed, "mincore was refused"
    return int((resident & 1).sum())
