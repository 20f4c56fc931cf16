"""Reading ahead into the page cache, and writing past it.

A checkpoint larger than memory evicts its own source from the page cache, and the kernel then takes longer to find free
pages than to copy bytes into them. Pages that are dropped as soon as they are on disk are free at once.
"""

import errno
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread

from qwen_pipeline.checkpoint.memory_budget import available_memory

CACHE_SHARE = 1 / 4
"""The share of the available memory that a checkpoint may fill with pages for the stage that reads it next."""
RWF_DONTCACHE = 0x80
"""``linux/fs.h``, since Linux 6.14; supported by ext4, XFS and Btrfs."""
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL)


def max_cached_bytes() -> int | None:
    """Return the bytes of a checkpoint that may stay in the page cache; None if the available memory is unknown."""
    memory = available_memory()
    return None if memory is None else int(memory * CACHE_SHARE)


def exceeds_page_cache(nbytes: int) -> bool:
    """Return whether a checkpoint of ``nbytes`` is too large to stay in the page cache."""
    limit = max_cached_bytes()
    return limit is not None and nbytes > limit


def write_uncached(fd: int, view: memoryview, offset: int) -> int:
    """Write like ``os.pwrite``; where kernel and file system support it, drop the pages once they are on disk."""
    try:
        return os.pwritev(fd, [view], offset, RWF_DONTCACHE)
    except (AttributeError, NotImplementedError):
        return os.pwrite(fd, view, offset)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return os.pwrite(fd, view, offset)


MAX_READ_AHEAD_BYTES = 4 * 2**30
"""More than disks deliver before the stage itself begins to read."""
REQUEST_BYTES = 128 * 2**10
"""The size of Linux's own read-ahead; of a longer request, some devices read only the beginning."""


def read_ahead(files: Iterable[Path]) -> Thread | None:
    """Ask the kernel to read files into the page cache, in this order and up to a limit, without waiting for it.

    The bytes do not count as read by this process. Return the requesting thread, which need not be joined; None where
    the system does not support such requests.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    thread = Thread(
        target=_request, args=(list(files), min(MAX_READ_AHEAD_BYTES, max_cached_bytes() or 0)), daemon=True
    )
    thread.start()
    return thread


def _request(files: Sequence[Path], budget: int) -> None:
    for path in files:
        with suppress(OSError), path.open("rb", buffering=0) as file:
            size = min(os.fstat(file.fileno()).st_size, budget)
            for start in range(0, size, REQUEST_BYTES):
                os.posix_fadvise(file.fileno(), start, min(REQUEST_BYTES, size - start), os.POSIX_FADV_WILLNEED)
            budget -= size
