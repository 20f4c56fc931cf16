"""A cache of the digests of directories without a manifest: bases from a hub, adapters from a trainer.

Hashing a base costs one read of it, so its digests are cached, keyed by the path, size, inode and modification time of
every file. Rewriting a file and restoring its time on purpose defeats the cache, but not the verification before a
release.
"""

import os
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from qwen_pipeline.checkpoint.digest import HashedTensor, HashedTensors, digest_file, digest_files, hash_tensors
from qwen_pipeline.checkpoint.lazy import CONFIG, Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.manifest import Contents, FileDigest, find_manifest
from qwen_pipeline.checkpoint.store.canonical import canonical_sha256
from qwen_pipeline.errors import EnvironmentFault
from qwen_pipeline.progress import Observe, unobserved


@dataclass(frozen=True, slots=True, kw_only=True)
class HashedCheckpoint:
    """The hash results of a checkpoint: of every tensor, and of the files other than weights."""

    tensors: HashedTensors
    files: Mapping[str, FileDigest]

    @property
    def digest(self) -> str:
        """The content digest."""
        return Contents(tensors={name: tensor.digest for name, tensor in self.tensors.items()}, files=self.files).digest


_HASHED = TypeAdapter(HashedCheckpoint)
_rereading: ContextVar[bool] = ContextVar("rereading", default=False)


@contextmanager
def rereading() -> Generator[None, None, None]:
    """Within the body, nothing is taken from the cache: every byte is read, as an audit demands."""
    token = _rereading.set(True)
    try:
        yield
    finally:
        _rereading.reset(token)


def _user_cache() -> Path:
    named = os.environ.get("XDG_CACHE_HOME")
    try:
        caches = Path(named) if named else Path.home() / ".cache"
    except RuntimeError as error:
        raise EnvironmentFault(
            "This user has no home directory, so there is no place for the cache of digests.",
            remedy="Set HOME or XDG_CACHE_HOME to a directory that this user can write.",
        ) from error
    return caches / "qwen-pipeline" / "digests-4"


@dataclass(frozen=True, slots=True)
class DigestCache:
    """Hash results in one file for each checkpoint and for each single file.

    Args:
        directory: The directory of the files, by default in the user's cache (``XDG_CACHE_HOME``).
    """

    directory: Path = field(default_factory=_user_cache)

    def find(self, root: Path, checkpoint: Checkpoint | None = None) -> HashedCheckpoint | None:
        """Return the hash results of a model directory from its manifest or the cache; None if it has to be read.

        Args:
            root: The directory.
            checkpoint: The opened directory, if it was not opened by :func:`open_checkpoint`.
        """
        if manifest := find_manifest(root):
            contents = manifest.contents
            return HashedCheckpoint(
                tensors={name: HashedTensor(digest=digest) for name, digest in contents.tensors.items()},
                files={path: file for path, file in contents.files.items() if isinstance(file, FileDigest)},
            )
        entry = self._entry(_files_of(root, open_checkpoint(root) if checkpoint is None else checkpoint))
        return _HASHED.validate_json(entry.read_bytes()) if self._remembers(entry) else None

    def add(self, root: Path, checkpoint: Checkpoint, tensors: HashedTensors) -> HashedCheckpoint:
        """Add the hash results of a directory without a manifest, and return them with those of its files."""
        hashed = HashedCheckpoint(tensors=tensors, files=digest_files({CONFIG: root / CONFIG, **checkpoint.sidecars}))
        _write(self._entry(_files_of(root, checkpoint)), _HASHED.dump_json(hashed))
        return hashed

    def sha256(self, path: Path) -> str:
        """Return the hex SHA-256 of a file, which is read once."""
        entry = self._entry([path])
        if not self._remembers(entry):
            _write(entry, digest_file(path).sha256.encode())
        return entry.read_text()

    def _remembers(self, entry: Path) -> bool:
        return entry.is_file() and not _rereading.get()

    def _entry(self, files: Iterable[Path]) -> Path:
        return self.directory / stat_key(files)


def checkpoint_digest(root: Path, *, checkpoint: Checkpoint | None = None, observe: Observe = unobserved) -> str:
    """Return the content digest of a model directory: from its manifest, from the cache, or by reading it once.

    Args:
        root: The directory.
        checkpoint: The opened directory, if it was not opened by :func:`open_checkpoint` but with other tensor names or
            more sidecars.
        observe: Called with the progress.
    """
    cache = DigestCache()
    if known := cache.find(root, checkpoint):
        return known.digest
    checkpoint = open_checkpoint(root) if checkpoint is None else checkpoint
    tensors = hash_tensors(checkpoint.tensors, task=f"digest {root.name}", observe=observe)
    return cache.add(root, checkpoint, tensors).digest


def directory_digest(files: Mapping[str, Path]) -> str:
    """Return a digest of files by their bytes, relative path -> file: ``sha256:<hex>``. Each file is read once."""
    cache = DigestCache()
    return "sha256:" + canonical_sha256({relative: cache.sha256(path) for relative, path in files.items()})


def fingerprint(root: Path) -> str:
    """Return a value that changes with a model directory, without reading its weights.

    It is the content digest if a manifest states it, and else a digest of every file's path, size, inode and
    modification time.
    """
    if manifest := find_manifest(root):
        return manifest.content_digest
    return f"files:{stat_key(_files_of(root, open_checkpoint(root)))}"


def _files_of(root: Path, checkpoint: Checkpoint) -> set[Path]:
    return {*(root / shard for shard in checkpoint.shards.values()), root / CONFIG, *checkpoint.sidecars.values()}


def stat_key(files: Iterable[Path]) -> str:
    """Return a digest of the path, size, inode and modification time of each file; none is read."""
    stats = [(str(path.resolve()), path.stat()) for path in sorted(files)]
    return canonical_sha256([[path, s.st_size, s.st_ino, s.st_mtime_ns] for path, s in stats])


def _write(entry: Path, data: bytes) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    scratch = entry.with_suffix(f".{os.getpid()}")
    scratch.write_bytes(data)
    scratch.replace(entry)
