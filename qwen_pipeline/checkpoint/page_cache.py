"""What the page cache is to hold of a checkpoint, and writing what it is not to hold.

A checkpoint that memory cannot hold pushes its own source out of the cache, and the kernel takes longer to find a free
page for each of its bytes than to copy them. Pages that are dropped as soon as they are on disk are found at once.
"""

import errno
import os

from qwen_pipeline.checkpoint.admission import available_memory

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
