"""What a finished directory says about itself: what it was derived from, and the digest of everything in it.

``content_digest`` covers tensors (name, dtype, shape, bytes) and the files beside them. It does not cover the shard
layout, logs, times or the host: the same inputs give the same digest anywhere.
"""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from qwen_pipeline.checkpoint.lazy import INDEX, MANIFEST
from qwen_pipeline.errors import CheckpointRefused

FORMAT = "qwen-pipeline/manifest/4"
OUTDATED = tuple(f"qwen-pipeline/manifest/{version}" for version in (1, 2, 3))
"""They digest a tensor by another rule, so that nothing in them can be compared with what is made now."""
UNREAD = "unread"
"""Stands for the digest of an input that is found while the input is read; never in a manifest."""
LOGS = "logs/"
"""Files below this folder are kept and listed but are not content: they hold times and hosts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDigest:
    """A tensor's dtype by its safetensors name, its shape and the digest of its bytes.

    Attributes:
        tree_blake3: Hex BLAKE3 over the BLAKE3 (32 bytes each) of the blocks of 1 MiB that the bytes are cut into.
    """

    dtype: str
    shape: tuple[int, ...]
    tree_blake3: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDigest:
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardDigest:
    """A safetensors file whose tensors have digests of their own: with its header they determine every byte.

    Attributes:
        header_sha256: Of the length prefix and the header.
    """

    bytes: int
    header_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """Digests of every tensor, and of every file including the shards (relative path -> digest)."""

    tensors: Mapping[str, TensorDigest]
    files: Mapping[str, FileDigest | ShardDigest]

    @property
    def digest(self) -> str:
        """``sha256:<hex>`` over tensors and files; independent of shard layout and file order."""
        beside = {
            path: file.sha256 for path, file in self.files.items() if is_content(path) and isinstance(file, FileDigest)
        }
        tensors = {name: [t.dtype, list(t.shape), t.tree_blake3] for name, t in self.tensors.items()}
        return "sha256:" + canonical_sha256({"tensors": tensors, "files": beside})

    @property
    def nbytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


@dataclass(frozen=True, kw_only=True)
class Derivation:
    """What a stage is about to do: everything that decides the bytes of its output.

    Attributes:
        stage: Name of the output, such as ``merged``.
        inputs: Role -> content digest, such as ``base`` -> ``sha256:...``.
        spec: The stage's settings as JSON values.
        code_version: Raised whenever the same inputs and spec would give other bytes.
    """

    stage: str
    inputs: Mapping[str, str]
    spec: Mapping[str, Any]
    code_version: str

    @property
    def is_complete(self) -> bool:
        """Whether the digest of every input is known."""
        return UNREAD not in self.inputs.values()

    @cached_property
    def key(self) -> str:
        """Hex SHA-256 of the four fields."""
        return canonical_sha256([self.stage, dict(self.inputs), dict(self.spec), self.code_version])


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """How the work went, on which machine; never part of a digest.

    Attributes:
        seconds: Wall clock time of the derivation.
        peak_memory_bytes: Highest resident memory of one process, this one or a worker.
        added_memory_bytes: What the work itself took: how far this process rose above where it stood at the start, or
            the whole of a worker, whichever is more.
        read_bytes: What this process read in the meantime, without its workers.
        written_bytes: What it wrote.
        started: ISO 8601 time in UTC.
        environment: Versions of what computed the bytes, and the platform.
    """

    seconds: float
    peak_memory_bytes: int
    added_memory_bytes: int
    read_bytes: int
    written_bytes: int
    started: str
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The last file written into a finished directory.

    Attributes:
        result: What the stage found out, as JSON values: the padding map, per-module losses, check reports.
        recipe: Role -> path of what the weights are computed from, if they are not stored here; ``contents.tensors``
            says what comes out.
    """

    derivation: Derivation
    contents: Contents
    content_digest: str
    result: Mapping[str, Any] = field(default_factory=dict[str, Any])
    recipe: Mapping[str, str] | None = None
    run: RunFigures
    format: str = FORMAT


_MANIFEST = TypeAdapter(Manifest)


def dump_manifest(manifest: Manifest) -> bytes:
    return _MANIFEST.dump_json(manifest, indent=2) + b"\n"


def open_manifest(root: Path) -> Manifest:
    """Read the manifest of a finished directory.

    Raises:
        CheckpointRefused: There is none (the directory is not finished, or not ours), it is damaged, or it has an
            older format.
    """
    path = root / MANIFEST
    if not path.is_file():
        raise CheckpointRefused(
            f"{root} has no {MANIFEST}: it is unfinished or was not made by this pipeline.",
            remedy="Run the stage that makes it; an interrupted run continues where it stopped.",
        )
    data = path.read_bytes()
    if (found := _format(data)) in OUTDATED:
        raise CheckpointRefused(
            f"{path} has the format {found!r}; this version reads {FORMAT!r}.",
            remedy="Run its stage again into another directory, and delete this one: the weights will be the same.",
        )
    if found != FORMAT:
        raise _damaged(path, f"format {found!r}, expected {FORMAT!r}")
    try:
        manifest = _MANIFEST.validate_json(data)
    except ValidationError as error:
        raise _damaged(path, str(error)) from error
    if manifest.content_digest != manifest.contents.digest:
        raise _damaged(path, f"it states {manifest.content_digest}, its entries give {manifest.contents.digest}")
    return manifest


def find_manifest(root: Path) -> Manifest | None:
    """Read a directory's manifest as :func:`open_manifest` does; None if it has none."""
    return open_manifest(root) if (root / MANIFEST).is_file() else None


def is_outdated(root: Path) -> bool:
    """Whether a finished directory has an older format: it counts as not there, and is made again."""
    return (root / MANIFEST).is_file() and _format((root / MANIFEST).read_bytes()) in OUTDATED


def is_content(path: str) -> bool:
    """Whether a file's own digest is part of the content digest: weights count by tensor, logs and manifests never."""
    return not (path.endswith(".safetensors") or path in (INDEX, MANIFEST) or path.startswith(LOGS))


def canonical_sha256(value: object) -> str:
    """Hex SHA-256 of a JSON value with sorted keys and no white space."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def describe_environment() -> dict[str, str]:
    """Versions of the packages that compute bytes, and the platform."""
    return {name: found for name in ("qwen-pipeline", "torch", "safetensors") if (found := _version(name))} | {
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _format(data: bytes) -> str | None:
    """Return what a manifest calls its format, before anything else in it is understood."""
    try:
        return json.loads(data)["format"]
    except (ValueError, KeyError, TypeError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _damaged(path: Path, why: str) -> CheckpointRefused:
    return CheckpointRefused(
        f"{path} is damaged: {why}.", remedy="Delete the directory and run the stage again; the result is the same."
    )
