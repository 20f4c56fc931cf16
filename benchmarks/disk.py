"""Dropping the page cache, and reading files as fast as plain code can."""

import os
import subprocess
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import local

from qwen_pipeline.checkpoint.lazy import Checkpoint

READERS, READ_BLOCK = 8, 8 * 2**20
"""Number of threads, and bytes of one read."""


def drop_caches() -> bool:
    """Drop the page cache; return False where that is not permitted."""
    with suppress(OSError, subprocess.CalledProcessError):
        subprocess.run(["sync"], check=True)
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return True
    return False


def drop_files(root: Path) -> None:
    """Drop the files below ``root`` from the page cache; the programs that read them stay there."""
    for path in root.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fdatasync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def weight_files(checkpoints: Iterable[Checkpoint]) -> list[Path]:
    """Return the files of the checkpoints' tensors, each once."""
    stored = [tensor.stored for checkpoint in checkpoints for tensor in checkpoint.tensors.values()]
    return list(dict.fromkeys(tensor.file.path for tensor in stored if tensor))


def seconds_to_read(files: Iterable[Path]) -> float:
    """Read files from end to end, one after the other, into reused memory; return the seconds."""
    own = local()

    def read(block: tuple[Path, int]) -> None:
        path, start = block
        if not hasattr(own, "memory"):
            own.memory = bytearray(READ_BLOCK)
        with path.open("rb", buffering=0) as file:
            os.preadv(file.fileno(), [own.memory], start)

    blocks = [(path, start) for path in files for start in range(0, path.stat().st_size, READ_BLOCK)]
    started = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, blocks))
    return time.perf_counter() - started
