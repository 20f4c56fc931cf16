"""A shard that several threads write, at any offset, and that can be resumed after the process was killed."""

import os
import stat
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock

from qwen_pipeline.checkpoint.files import begin_writeback, sync_directory
from qwen_pipeline.checkpoint.page_cache import write_uncached
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec, header_bytes


class ShardFile:
    """A safetensors file under the name ``<name>.tmp`` until its last tensor is complete and on disk.

    Args:
        path: Its final path.
        specs: Its tensors, in the order of their bytes.
        cached: Whether it may stay in the page cache once it is on disk.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], *, cached: bool = True) -> None:
        self._path, self._scratch = path, path.with_name(path.name + ".tmp")
        self._header = header_bytes(specs)
        self._offsets: dict[str, int] = {}
        self._size = len(self._header)
        for name, spec in specs.items():
            self._offsets[name] = self._size
            self._size += spec.nbytes
        self._missing: set[str] = set()
        self._lock = Lock()
        self._pwrite = os.pwrite if cached else write_uncached
        self._fd = -1

    @property
    def is_finished(self) -> bool:
        return self._path.is_file()

    @property
    def existing(self) -> Path:
        """The path at which an earlier attempt left the file, if there was one."""
        return self._path if self.is_finished else self._scratch

    def begin(self, missing: Collection[str]) -> None:
        """Open the file to write the missing tensors; those that an earlier attempt completed are kept."""
        if self.is_finished:
            self._path.replace(self._scratch)
        if not self._is_resumable():
            self._scratch.unlink(missing_ok=True)
        self._missing = set(missing)
        self._fd = os.open(self._scratch, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.ftruncate(self._fd, self._size)
        self._write(0, memoryview(self._header))
        if not missing:
            self._finish()

    def write(self, name: str, start: int, view: memoryview) -> None:
        """Write a part of a tensor from its byte ``start`` on, and begin writeback to the disk."""
        offset = self._offsets[name] + start
        self._write(offset, view)
        begin_writeback(self._fd, offset, len(view))

    def complete(self, name: str) -> None:
        """Mark a tensor as written; after the last one, rename the file to its final path."""
        with self._lock:
            self._missing.remove(name)
            is_last = not self._missing
        if is_last:
            self._finish()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _is_resumable(self) -> bool:
        """Return whether the temporary file exists, has the same header and is not a hard link to another file."""
        with suppress(OSError):
            found = self._scratch.lstat()
            if stat.S_ISREG(found.st_mode) and (found.st_nlink, found.st_size) == (1, self._size):
                with self._scratch.open("rb") as file:
                    return file.read(len(self._header)) == self._header
        return False

    def _write(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += self._pwrite(self._fd, view[done:], offset + done)

    def _finish(self) -> None:
        os.fsync(self._fd)
        self.close()
        self._scratch.rename(self._path)
        sync_directory(self._path.parent)
