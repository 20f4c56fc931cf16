"""Digests of directories that were not made here: bases from a hub, adapters from a trainer.

Hashing a base costs one read of it, so the result is remembered, keyed by every file's path, size, inode and
modification time. Whoever rewrites a file and restores its time on purpose defeats the memory, not the verification
before a release.
"""

import ctypes
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.lazy import CONFIG, Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.manifest import Contents, FileDigest, TensorDigest, canonical_sha256, open_manifest
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.progress import Observe, Progress, unobserved

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 16 * 2**20
"""Bytes of one block of rows: the unit in which tensors are read, computed, hashed and written."""
_M_MMAP_THRESHOLD = -3
"""``malloc.h``"""


def checkpoint_digest(root: Path, *, observe: Observe = unobserved) -> str:
    """Return the content digest of a model directory: from its manifest, from memory, or by reading it once."""
    try:
        return open_manifest(root).content_digest
    except CheckpointRefused:
        pass
    checkpoint = open_checkpoint(root)
    files = {*(root / shard for shard in checkpoint.shards.values()), root / CONFIG, *checkpoint.sidecars.values()}
    return _remembered(files, lambda: contents_of(checkpoint, root, observe=observe).digest)


def directory_digest(files: Mapping[str, Path]) -> str:
    """Return a digest of files as they are, relative path -> file: ``sha256:<hex>``; each is read once."""
    shas = {
        relative: _remembered([path], lambda path=path: digest_file(path).sha256) for relative, path in files.items()
    }
    return "sha256:" + canonical_sha256(shas)


def contents_of(checkpoint: Checkpoint, root: Path, *, observe: Observe = unobserved) -> Contents:
    """Hash every tensor and sidecar of a stored checkpoint; shards are not hashed as files."""
    done, total = 0, checkpoint.nbytes
    tensors: dict[str, TensorDigest] = {}
    for name, spec in checkpoint.items():
        sha = hashlib.sha256()
        for block in row_blocks(checkpoint, name):
            sha.update(as_bytes(block))
        tensors[name] = TensorDigest(dtype=spec.dtype, shape=spec.shape, sha256=sha.hexdigest())
        done += spec.nbytes
        observe(Progress(task=f"digest {root.name}", done=done, total=total, unit="bytes"))
    beside = {CONFIG: root / CONFIG, **checkpoint.sidecars}
    return Contents(tensors=tensors, files=digest_files(beside))


def digest_files(files: Mapping[str, Path]) -> dict[str, FileDigest]:
    """Hash files: relative path -> digest."""
    return {relative: digest_file(path) for relative, path in sorted(files.items())}


def digest_file(path: Path) -> FileDigest:
    with path.open("rb") as file:
        return FileDigest(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def row_blocks(checkpoint: Checkpoint, name: str) -> Iterator["torch.Tensor"]:
    """Yield a tensor as consecutive blocks of rows of at most :data:`BLOCK_BYTES` (at least one row)."""
    _give_blocks_back_when_freed()
    for start, stop in block_ranges(checkpoint[name]):
        yield checkpoint.tensors[name].read(start, stop)


@cache
def _give_blocks_back_when_freed() -> None:
    """Have glibc map each block by itself, so that the kernel has it back once it is freed.

    Otherwise glibc raises its threshold with the first blocks, keeps later ones on a heap that fragments, and the peak
    is a matter of luck. Other C libraries have no such knob.
    """
    with suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def block_ranges(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    rows = max(1, BLOCK_BYTES // max(1, spec.row_bytes))
    for start in range(0, spec.rows, rows):
        yield start, min(start + rows, spec.rows)


def as_bytes(tensor: "torch.Tensor") -> memoryview:
    """A contiguous tensor's memory, without a copy."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _remembered(files: Iterable[Path], compute: Callable[[], str]) -> str:
    memory = _cache_dir() / f"{_stat_key(files)}.txt"
    if memory.is_file():
        return memory.read_text()
    digest = compute()
    memory.parent.mkdir(parents=True, exist_ok=True)
    scratch = memory.with_suffix(f".{os.getpid()}")
    scratch.write_text(digest)
    scratch.replace(memory)
    return digest


def _stat_key(files: Iterable[Path]) -> str:
    stats = [(str(path.resolve()), path.stat()) for path in sorted(files)]
    return canonical_sha256([[path, s.st_size, s.st_ino, s.st_mtime_ns] for path, s in stats])


def _cache_dir() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "qwen-pipeline" / "digests"
