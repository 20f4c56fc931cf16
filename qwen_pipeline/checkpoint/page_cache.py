"""What the page cache is to hold of a checkpoint, and writing what it is not to hold.

A checkpoint that memory cannot hold pushes its own source out of the cache, and the kernel takes longer to find a free
page for each of its bytes than to copy them. Pages that are dropped as soon as they are on disk are found at once.
"""

import errno
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread

from qwen_pipeline.checkpoint.memory_budget import available_memory

CACHE_SHARE = 1 / 4
"""How much of the memory that is left a checkpoint may fill with pages for whoever reads it next."""
RWF_DONTCACHE = 0x80
"""``linux/fs.h``, since Linux 6.14; ext4, XFS and Btrfs heed it."""
_UNKNOWN = (errno.EOPNOTSUPP, errno.EINVAL)


def most_cached_bytes() -> int | None:
    """Return how much of a checkpoint the cache is to hold; None if memory has no known end."""
    memory = available_memory()
    return None if memory is None else int(memory * CACHE_SHARE)


def outgrows_cache(nbytes: int) -> bool:
    """Whether a checkpoint of so many bytes is more than the cache is to hold."""
    most = most_cached_bytes()
    return most is not None and nbytes > most


def write_uncached(fd: int, view: memoryview, offset: int) -> int:
    """Do as ``os.pwrite``; where kernel and file system can, the pages go as soon as they are on disk."""
    try:
        return os.pwritev(fd, [view], offset, RWF_DONTCACHE)
    except (AttributeError, NotImplementedError):
        return os.pwrite(fd, view, offset)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        return os.pwrite(fd, view, offset)


MOST_BYTES = 4 * 2**30
"""More than disks bring before the stage reads by itself."""
PIECE_BYTES = 128 * 2**10
"""Linux's own read-ahead: of a longer request some devices are given only the beginning."""


def read_ahead(files: Iterable[Path]) -> Thread | None:
    """Have the kernel begin with files in this order, as far as the page cache is to hold them; return at once.

    Nothing is counted as read, and nothing waits for the thread that is returned; None where a system cannot be asked.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    asking = Thread(target=_ask, args=(list(files), min(MOST_BYTES, most_cached_bytes() or 0)), daemon=True)
    asking.start()
    return asking


def _ask(files: Sequence[Path], budget: int) -> None:
    for path in files:
        with suppress(OSError), path.open("rb", buffering=0) as file:
            size = min(os.fstat(file.fileno()).st_size, budget)
            for start in range(0, size, PIECE_BYTES):
                os.posix_fadvise(file.fileno(), start, min(PIECE_BYTES, size - start), os.POSIX_FADV_WILLNEED)
            budget -= size
