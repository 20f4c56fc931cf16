"""Hashing of many files at the speed of the disk: a thread for each core, largest files first, each byte read once.

Both hashes release the GIL. A file whose SHA-256 is stated is read from its beginning to its end; a shard whose
tensors alone have digests is divided, so that all cores can hash one shard.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import local
from typing import Any

from qwen_pipeline.checkpoint.safetensors_file import SafetensorsFile, open_safetensors, read_header
from qwen_pipeline.errors import CheckpointRefused

LEAF_BYTES = 2**20
"""Bytes of a leaf of a tensor's digest; fixed by the format."""
_LEAVES_OF_A_PIECE = 32
_READ_BYTES = 2**20

try:
    from blake3 import blake3
except ImportError:  # a serving host may have none: tensors are then covered by the SHA-256 of their file
    blake3 = None

Tensor = tuple[str, list[int], str]
"""dtype, shape and ``tree_blake3``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileHash:
    """The digests of one file.

    Attributes:
        sha256: SHA-256 of the whole file; None if only its header and tensors were to be hashed.
        header_sha256: SHA-256 of the length prefix and header of a safetensors file; None for others.
        tensors: Every tensor of a safetensors file; empty without ``blake3``.
    """

    bytes: int
    sha256: str | None = None
    header_sha256: str | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


def can_hash_tensors() -> bool:
    return blake3 is not None


def hash_files(
    files: Mapping[str, Path], *, whole: Callable[[str], bool], observe: Callable[[int], None] = lambda _: None
) -> dict[str, FileHash | CheckpointRefused]:
    """Hash files on all cores; return name -> digests, or the reason why a file could not be read.

    Args:
        files: Name -> file.
        whole: Returns whether the SHA-256 of a file is needed. Other files are safetensors shards.
        observe: Called with numbers of bytes as they are done.
    """
    size = {name: path.stat().st_size if path.is_file() else 0 for name, path in files.items()}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) + 1) as threads:
        pending: dict[str, Callable[[], FileHash]] = {}
        for name in sorted(files, key=size.__getitem__, reverse=True):
            begin = _begin_whole if whole(name) else _begin_shard
            pending[name] = begin(threads, files[name])
        found: dict[str, FileHash | CheckpointRefused] = {}
        for name, finish in pending.items():
            try:
                found[name] = finish()
            except CheckpointRefused as refused:
                found[name] = refused
            except OSError as error:
                found[name] = CheckpointRefused(f"{files[name]} cannot be read: {error}.", remedy="Fetch it again.")
            observe(size[name])
    return found


def _begin_whole(threads: ThreadPoolExecutor, path: Path) -> Callable[[], FileHash]:
    return threads.submit(_hash_whole, path).result


def _begin_shard(threads: ThreadPoolExecutor, path: Path) -> Callable[[], FileHash]:
    assert blake3, "the digests of tensors need the package blake3"
    try:
        file = open_safetensors(path)
    except (CheckpointRefused, OSError) as error:
        refused = error
        return lambda: _raise(refused)
    leaves = {
        name: [threads.submit(_hash_leaves, file, name, piece) for piece in _pieces(file.specs[name].nbytes)]
        for name in file.specs
    }
    return lambda: FileHash(
        bytes=path.stat().st_size,
        header_sha256=hashlib.sha256(read_header(path)).hexdigest(),
        tensors={name: _tensor(file, name, _joined(futures)) for name, futures in leaves.items()},
    )


def _hash_whole(path: Path) -> FileHash:
    """Read a file from its beginning to its end, for its SHA-256 and, of a safetensors file, those of its tensors."""
    size = path.stat().st_size
    if path.suffix != ".safetensors" or not blake3:
        with path.open("rb") as stream:
            return FileHash(bytes=size, sha256=hashlib.file_digest(stream, "sha256").hexdigest())
    file, header = open_safetensors(path), read_header(path)
    whole, tensors, view = hashlib.sha256(header), dict[str, Tensor](), memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as stream:
        stream.seek(len(header))
        for name, spec in file.specs.items():
            digests: list[bytes] = []
            for start in range(0, spec.nbytes, LEAF_BYTES):
                leaf = view[: min(LEAF_BYTES, spec.nbytes - start)]
                _fill(stream, leaf, path)
                whole.update(leaf)
                digests.append(blake3(leaf).digest())
            tensors[name] = _tensor(file, name, b"".join(digests))
    return FileHash(
        bytes=size, sha256=whole.hexdigest(), header_sha256=hashlib.sha256(header).hexdigest(), tensors=tensors
    )


def _fill(stream: Any, view: memoryview, path: Path) -> None:
    done = 0
    while done < len(view):
        if not (count := stream.readinto(view[done:])):
            raise CheckpointRefused(f"{path} ends early.", remedy="Fetch it again.")
        done += count


def _pieces(nbytes: int) -> Iterator[range]:
    """Yield the starts of leaves, a few at a time."""
    starts = range(0, nbytes, LEAF_BYTES)
    for first in range(0, len(starts), _LEAVES_OF_A_PIECE):
        yield starts[first : first + _LEAVES_OF_A_PIECE]


_thread = local()


def _hash_leaves(file: SafetensorsFile, name: str, starts: range) -> bytes:
    """Return the digests of a few leaves of a tensor, one after the other."""
    assert blake3
    if not hasattr(_thread, "buffer"):
        _thread.buffer = memoryview(bytearray(LEAF_BYTES))
    digests: list[bytes] = []
    with file.path.open("rb", buffering=0) as stream:
        stream.seek(file.offsets[name] + starts.start)
        for start in starts:
            leaf = _thread.buffer[: min(LEAF_BYTES, file.specs[name].nbytes - start)]
            _fill(stream, leaf, file.path)
            digests.append(blake3(leaf).digest())
    return b"".join(digests)


def _joined(futures: list[Future[bytes]]) -> bytes:
    return b"".join(future.result() for future in futures)


def _tensor(file: SafetensorsFile, name: str, leaves: bytes) -> Tensor:
    assert blake3
    spec = file.specs[name]
    return spec.dtype, list(spec.shape), blake3(leaves).hexdigest()


def _raise(error: Exception) -> FileHash:
    raise error
