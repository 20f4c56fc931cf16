"""JSON objects, atomic writes, syncs, locks, and copies that share blocks where the file system can."""

import ctypes
import fcntl
import json
import os
import shutil
import stat
import tomllib
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from qwen_pipeline.errors import CheckpointRefused, InputRefused, listed

_FICLONE = 0x40049409
_SYNC_FILE_RANGE_WRITE = 2
"""``linux/fs.h``"""


_SCRATCH = ".new"
_LFS_POINTER = b"version https://git-lfs"
MAX_JSON_BYTES = 100_000_000
"""The largest JSON file that is read; the index of the largest mixture published so far has a tenth of it."""
MAX_TOML_BYTES = 1_000_000


def load_json(path: Path, *, refused: type[InputRefused] = CheckpointRefused) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointRefused: The file cannot be read, is too large, or is not a JSON object. ``refused`` may be another
            class.
    """
    try:
        value = parse_json(read_regular(path, refused))
    except FileNotFoundError as error:
        raise refused(f"{path} is missing.", remedy="Pass a directory that has it, or fetch it again.") from error
    except OSError as error:
        raise refused(f"{path} cannot be read: {error}.", remedy="Make it readable, or fetch it again.") from error
    except (ValueError, RecursionError) as error:
        raise refused(f"{path} is not valid JSON: {error}.", remedy="Fetch or save the file again.") from error
    if not isinstance(value, dict):
        raise refused(f"{path} is not a JSON object.", remedy="Fetch or save the file again.")
    return cast("dict[str, Any]", value)


def with_home(path: Path) -> Path:
    """Return a path whose ``~`` is a home directory; that of a user who does not exist stays, as in a shell."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def load_toml(path: Path, *, refused: type[InputRefused] = InputRefused) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        InputRefused: The file cannot be read, is too large, or is not TOML in UTF-8. ``refused`` may be another class.
    """
    try:
        return tomllib.loads(read_regular(path, refused, most=MAX_TOML_BYTES).decode())
    except OSError as error:
        raise refused(f"{path} cannot be read: {error}.", remedy="Make it a readable file.") from error
    except (ValueError, RecursionError) as error:
        raise refused(f"{path} is not valid TOML in UTF-8: {error}.", remedy="Correct the file.") from error


def parse_json(data: str | bytes, *, half_surrogates: bool = False) -> Any:
    """Parse JSON in UTF-8 whose keys are unique, whose nesting Python can follow, and whose texts can be written.

    Args:
        data: The JSON.
        half_surrogates: Whether an escape may stand for half of a surrogate pair, which is not text.

    Raises:
        ValueError: It is not.
    """
    text = data.decode() if isinstance(data, bytes) else data
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
        if not half_surrogates and "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def read_regular(path: Path, refused: type[InputRefused] = CheckpointRefused, *, most: int = MAX_JSON_BYTES) -> bytes:
    """Read a small file.

    Raises:
        CheckpointRefused: It is not a regular file, or larger than ``most``. ``refused`` may be another class.
        OSError: It cannot be read.
    """
    require_regular(path, refused=refused)
    if (size := path.stat().st_size) > most:
        raise refused(
            f"{path} has {size:,} bytes, but such a file here has at most {most:,}.",
            remedy="Fetch or save the file again.",
        )
    require_no_pointer(data := path.read_bytes(), path, refused=refused)
    return data


def require_regular(path: Path, *, refused: type[InputRefused] = CheckpointRefused) -> None:
    """Require a regular file, or a link to one; reading from a FIFO or a device would wait, or never end.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointRefused: It is something else. ``refused`` may be another class.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise refused(f"{path} is not a regular file.", remedy="Put the file itself in its place.")


def require_no_pointer(beginning: bytes, path: Path, *, refused: type[InputRefused] = CheckpointRefused) -> None:
    """Require that the beginning of a file is not that of a pointer of Git LFS, which clones have without LFS.

    Raises:
        CheckpointRefused: It is. ``refused`` may be another class.
    """
    if beginning.startswith(_LFS_POINTER):
        raise refused(
            f"{path} is a pointer of Git LFS, not the file that it points to.",
            remedy="Fetch the files themselves, such as with git lfs pull in the clone.",
        )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        repeated = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"repeated keys {listed([repr(key) for key in repeated])}")
    return table


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file so that after a crash it is either absent or complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as file:
        file.write(data)


def remove_scratch(root: Path) -> None:
    """Remove the files of a directory that :func:`write_bytes` had not completed when its process ended."""
    for scratch in root.rglob(f"*{_SCRATCH}"):
        scratch.unlink()


def open_locked(path: Path, *, wait: bool = False) -> BinaryIO:
    """Open a lock file, created if absent, with an exclusive ``flock`` that is held until the file is closed.

    A file that its last holder removed is not a lock: another process may hold the one that took its name.

    Raises:
        BlockingIOError: Another process holds the lock, and ``wait`` is False.
    """
    while True:
        file = path.open("wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_open(path, file):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _is_open(path: Path, file: BinaryIO) -> bool:
    """Return whether a name still leads to an open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def sync_directory(path: Path) -> None:
    """Make renames and new names within a directory survive a crash."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(root: Path) -> None:
    """Make every file and directory below a directory survive a crash."""
    for path in (*root.rglob("*"), root):
        if path.is_dir():
            sync_directory(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def begin_writeback(fd: int, offset: int, length: int) -> None:
    """Begin writeback of a part of a file to disk, where the system supports that."""
    if sync_file_range := _sync_file_range():
        sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Return the function of the C library; ctypes releases the GIL while it runs."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, by a copy-on-write clone where the disk supports it; later writes to one do not change the other."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not clone_file(source, target):
        shutil.copyfile(source, target)


def clone_file(source: Path, target: Path) -> bool:
    """Make ``target`` a copy-on-write clone of ``source``; return whether the disk supports that."""
    try:
        with source.open("rb") as reading, _replacing(target) as writing:
            fcntl.ioctl(writing.fileno(), _FICLONE, reading.fileno())
    except OSError:
        return False
    return True


def share_file(source: Path, target: Path, *, hard_links: bool) -> bool:
    """Make ``target`` a copy-on-write clone of ``source``, or else a hard link to it; return whether one was made."""
    if clone_file(source, target):
        return True
    if not hard_links:
        return False
    try:
        target.unlink(missing_ok=True)
        target.hardlink_to(source.resolve())
    except OSError:
        return False
    sync_directory(target.parent)
    return True


@contextmanager
def _replacing(path: Path) -> Generator[BinaryIO, None, None]:
    scratch = path.with_name(path.name + _SCRATCH)
    try:
        with scratch.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    sync_directory(path.parent)
