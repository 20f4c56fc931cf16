"""Digests of checkpoints, and of directories that were not made here: bases from a hub, adapters from a trainer.

Hashing a base costs one read of it, so what was found is remembered, keyed by every file's path, size, inode and
modification time. Whoever rewrites a file and restores its time on purpose defeats the memory, not the verification
before a release.
"""

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from qwen_pipeline.checkpoint.buffers import BLOCK_BYTES
from qwen_pipeline.checkpoint.lazy import CONFIG, Checkpoint, LazyTensor, open_checkpoint
from qwen_pipeline.checkpoint.manifest import (
    Contents,
    FileDigest,
    ShardDigest,
    TensorDigest,
    canonical_sha256,
    find_manifest,
)
from qwen_pipeline.checkpoint.safetensors_file import ITEM_BYTES, TensorSpec, as_bytes, read_header
from qwen_pipeline.checkpoint.thread_pool import map_ordered
from qwen_pipeline.checkpoint.tree_hash import TreeHash
from qwen_pipeline.progress import Meter, Observe, unobserved

if TYPE_CHECKING:
    import torch


GRAIN_ROWS = 64
"""Blocks of at least this many rows begin at a multiple of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenTensor:
    """What is known of a tensor whose every byte was seen. ``finite``: no NaN and no infinity; None: not looked at."""

    digest: TensorDigest
    finite: bool | None = None


Seen = Mapping[str, SeenTensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownCheckpoint:
    """What is known of a checkpoint without reading it again: every tensor, and the files beside the weights."""

    tensors: Seen
    files: Mapping[str, FileDigest]

    @property
    def digest(self) -> str:
        return Contents(tensors={name: seen.digest for name, seen in self.tensors.items()}, files=self.files).digest


_KNOWN = TypeAdapter(KnownCheckpoint)


class PassingTensor:
    """Learns about a tensor as its blocks pass by, in any order, from whichever thread; looks for NaN if asked to."""

    def __init__(self, spec: TensorSpec, *, looks: bool = True) -> None:
        self._spec = spec
        self._hash = TreeHash(spec.nbytes)
        self._finite = True if looks else None

    def see(self, start: int, block: "torch.Tensor") -> bool:
        """Take the block that begins at byte ``start``; return False once something was not finite."""
        if self._finite and not is_finite(block):
            self._finite = False
        self._hash.add(start, as_bytes(block))
        return self._finite is not False

    @property
    def seen(self) -> SeenTensor | None:
        """What was learned, or None while bytes are missing."""
        if not self._hash.is_complete:
            return None
        digest = TensorDigest(dtype=self._spec.dtype, shape=self._spec.shape, tree_blake3=self._hash.hexdigest())
        return SeenTensor(digest=digest, finite=self._finite)


def checkpoint_digest(root: Path, *, observe: Observe = unobserved) -> str:
    """Return the content digest of a model directory: from its manifest, from memory, or by reading it once."""
    if known := known_checkpoint(root):
        return known.digest
    checkpoint = open_checkpoint(root)
    tensors = read_tensors(checkpoint, checkpoint, task=f"digest {root.name}", observe=observe)
    return remember(root, checkpoint, tensors).digest


def foreign_digest(checkpoint: Checkpoint, root: Path, *, observe: Observe = unobserved) -> str:
    """Return the content digest of a directory that was opened in a way of its own: by name, or with more sidecars."""
    if digest := remembered_digest(checkpoint, root):
        return digest
    tensors = read_tensors(checkpoint, checkpoint, task=f"digest {root.name}", observe=observe)
    return remember(root, checkpoint, tensors).digest


def remembered_digest(checkpoint: Checkpoint, root: Path) -> str | None:
    """Return the digest of a directory as its manifest or the memory has it, or None if it has to be read."""
    if manifest := find_manifest(root):
        return manifest.content_digest
    memory = _memory(_files_of(root, checkpoint))
    return _KNOWN.validate_json(memory.read_bytes()).digest if memory.is_file() else None


def known_checkpoint(root: Path) -> KnownCheckpoint | None:
    """Return what a manifest or the memory says about a model directory, or None if it has to be read."""
    if manifest := find_manifest(root):
        contents = manifest.contents
        files = {path: file for path, file in contents.files.items() if isinstance(file, FileDigest)}
        tensors = {name: SeenTensor(digest=digest) for name, digest in contents.tensors.items()}
        return KnownCheckpoint(tensors=tensors, files=files)
    memory = _memory(_files_of(root, open_checkpoint(root)))
    return _KNOWN.validate_json(memory.read_bytes()) if memory.is_file() else None


def remember(root: Path, checkpoint: Checkpoint, tensors: Seen) -> KnownCheckpoint:
    """Keep what was learned of a directory that has no manifest."""
    known = KnownCheckpoint(tensors=tensors, files=digest_files({CONFIG: root / CONFIG, **checkpoint.sidecars}))
    _keep(_memory(_files_of(root, checkpoint)), _KNOWN.dump_json(known))
    return known


def appearance(root: Path) -> str:
    """Return what a model directory looks like without reading it: its digest if it is known for good, else stats."""
    if manifest := find_manifest(root):
        return manifest.content_digest
    return f"files:{_stat_key(_files_of(root, open_checkpoint(root)))}"


def directory_digest(files: Mapping[str, Path]) -> str:
    """Return a digest of files as they are, relative path -> file: ``sha256:<hex>``; each is read once."""
    return "sha256:" + canonical_sha256({relative: _remembered_sha256(path) for relative, path in files.items()})


def contents_of(checkpoint: Checkpoint, root: Path, *, observe: Observe = unobserved) -> Contents:
    """Hash every tensor and sidecar of a stored checkpoint; shards are not hashed as files."""
    tensors = read_tensors(checkpoint, checkpoint, task=f"digest {root.name}", observe=observe)
    return Contents(
        tensors={name: seen.digest for name, seen in tensors.items()},
        files=digest_files({CONFIG: root / CONFIG, **checkpoint.sidecars}),
    )


def read_tensors(
    checkpoint: Checkpoint, names: Collection[str], *, task: str, observe: Observe = unobserved
) -> dict[str, SeenTensor]:
    """Read these tensors, as fast as the disk and all cores allow, and return what was seen."""
    passing = {name: PassingTensor(checkpoint[name]) for name in names}
    meter = Meter(task, sum(checkpoint[name].nbytes for name in names), observe)
    blocks = ((name, block) for name in names for block in blocks_of(checkpoint.tensors[name]))

    def read(job: tuple[str, Block]) -> None:
        name, block = job
        loaded = block.load()
        passing[name].see(block.start, loaded)
        meter.add(loaded.nbytes)

    map_ordered(blocks, read, tick=meter.tell)
    return {name: _all_seen(name, tensor) for name, tensor in passing.items()}


def digest_files(files: Mapping[str, Path]) -> dict[str, FileDigest]:
    """Hash files: relative path -> digest."""
    return {relative: digest_file(path) for relative, path in sorted(files.items())}


def digest_file(path: Path) -> FileDigest:
    with path.open("rb") as file:
        return FileDigest(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def digest_shard(path: Path) -> ShardDigest:
    """Hash the header of a safetensors file; its tensors are hashed by themselves."""
    return ShardDigest(bytes=path.stat().st_size, header_sha256=hashlib.sha256(read_header(path)).hexdigest())


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive bytes of a tensor, from byte ``start`` on, not loaded yet."""

    start: int
    load: Callable[[], "torch.Tensor"]


def blocks_of(tensor: LazyTensor) -> Iterator[Block]:
    """Yield a tensor in blocks of at most :data:`BLOCK_BYTES`.

    Stored bytes are cut anywhere. What is computed is cut between rows, so that a block has at least one row.
    """
    if not tensor.spec.nbytes:
        yield Block(0, lambda: tensor.read(0, tensor.spec.rows))
    elif stored := tensor.stored:
        item = ITEM_BYTES[tensor.spec.dtype]
        elements, most = tensor.spec.nbytes // item, BLOCK_BYTES // item
        for start in range(0, elements, most):
            yield Block(start * item, _calling(stored.load, start, min(start + most, elements)))
    else:
        for start, stop in block_ranges(tensor.spec):
            yield Block(start * tensor.spec.row_bytes, _calling(tensor.read, start, stop))


def block_ranges(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    rows = max(1, BLOCK_BYTES // max(1, spec.row_bytes))
    rows -= rows % GRAIN_ROWS if rows > GRAIN_ROWS else 0
    for start in range(0, spec.rows, rows):
        yield start, min(start + rows, spec.rows)


def _calling(load: Callable[[int, int], "torch.Tensor"], start: int, stop: int) -> Callable[[], "torch.Tensor"]:
    return lambda: load(start, stop)


def _all_seen(name: str, tensor: PassingTensor) -> SeenTensor:
    seen = tensor.seen
    assert seen, f"{name} was not read from end to end"
    return seen


def _files_of(root: Path, checkpoint: Checkpoint) -> set[Path]:
    return {*(root / shard for shard in checkpoint.shards.values()), root / CONFIG, *checkpoint.sidecars.values()}


def _remembered_sha256(path: Path) -> str:
    memory = _memory([path])
    if not memory.is_file():
        _keep(memory, digest_file(path).sha256.encode())
    return memory.read_text()


def _keep(memory: Path, data: bytes) -> None:
    memory.parent.mkdir(parents=True, exist_ok=True)
    scratch = memory.with_suffix(f".{os.getpid()}")
    scratch.write_bytes(data)
    scratch.replace(memory)


def _stat_key(files: Iterable[Path]) -> str:
    stats = [(str(path.resolve()), path.stat()) for path in sorted(files)]
    return canonical_sha256([[path, s.st_size, s.st_ino, s.st_mtime_ns] for path, s in stats])


def _memory(files: Iterable[Path]) -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    cache = Path(home) if home else Path.home() / ".cache"
    return cache / "qwen-pipeline" / "digests-4" / _stat_key(files)


def is_finite(tensor: "torch.Tensor") -> bool:
    """Return whether there is no NaN and no infinity, without a temporary of the tensor's size."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(isfinite(end.item()) for end in tensor.aminmax())
