"""Having the kernel read what a stage is about to read, while the stage still waits for torch to be imported."""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread

from qwen_pipeline.checkpoint.page_cache import most_cached_bytes

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
