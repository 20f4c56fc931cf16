"""The manifest of a finished directory: what it was derived from, and the digests of everything in it.

``content_digest`` covers tensors (name, dtype, shape, bytes) and all files other than weights. It does not cover the
shard layout, logs, times or the host: the same inputs give the same digest on every machine.
"""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import TypeAdapter

from qwen_pipeline.checkpoint.files import parse_json, read_regular
from qwen_pipeline.checkpoint.lazy import MANIFEST
from qwen_pipeline.checkpoint.store.canonical import canonical_sha256, content_digest
from qwen_pipeline.checkpoint.store.origin import origin
from qwen_pipeline.errors import CheckpointRefused

FORMAT = "qwen-pipeline/manifest/4"
OUTDATED = tuple(f"qwen-pipeline/manifest/{version}" for version in (1, 2, 3))
"""Older formats, whose digests of tensors are computed differently and cannot be compared with those of this one."""
UNREAD = "unread"
"""The placeholder for the digest of an input that is computed while the input is read; never in a manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDigest:
    """A tensor's dtype by its safetensors name, its shape and the digest of its bytes.

    Attributes:
        dtype: Safetensors name, such as ``BF16``.
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
    """A safetensors file whose tensors have digests of their own. Header and tensors determine every byte of it.

    Attributes:
        header_sha256: Hex SHA-256 of the length prefix and the header.
    """

    bytes: int
    header_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The digests of a directory: of every tensor by name, and of every file, shards included, by relative path."""

    tensors: Mapping[str, TensorDigest]
    files: Mapping[str, FileDigest | ShardDigest]

    @property
    def digest(self) -> str:
        """The content digest, ``sha256:<hex>``: over tensors and files, independent of shard layout and file order."""
        sha256 = {path: file.sha256 for path, file in self.files.items() if isinstance(file, FileDigest)}
        return content_digest(
            {name: (t.dtype, list(t.shape), t.tree_blake3) for name, t in self.tensors.items()}, sha256
        )

    @property
    def nbytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


@dataclass(frozen=True, kw_only=True)
class Derivation:
    """Everything that determines the bytes of a stage's output. Its key names the output in a store.

    Attributes:
        stage: Name of the output, such as ``merged``.
        inputs: Role -> content digest, such as ``base`` -> ``sha256:...``; :data:`UNREAD` if it is not known yet.
        spec: The stage's settings as JSON values.
        code_version: Version of the stage's code. It is raised whenever the same inputs and spec give different bytes.
    """

    stage: str
    inputs: Mapping[str, str]
    spec: Mapping[str, Any]
    code_version: str

    @property
    def is_complete(self) -> bool:
        """True if the digest of every input is known, so that the key is final."""
        return UNREAD not in self.inputs.values()

    @cached_property
    def key(self) -> str:
        """Hex SHA-256 of the four fields as canonical JSON."""
        return canonical_sha256([self.stage, dict(self.inputs), dict(self.spec), self.code_version])


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """Time, memory, and bytes read and written by a derivation, and its environment; never part of a digest.

    Attributes:
        seconds: Wall clock time of the derivation.
        peak_memory_bytes: Highest resident memory of one process, this one or a worker.
        added_memory_bytes: The larger of this process's peak less its resident memory at the start, and the peak of a
            worker.
        read_bytes: Bytes that this process read, without its workers.
        written_bytes: Bytes that this process wrote, without its workers.
        started: ISO 8601 time in UTC.
        environment: Versions of the packages that computed the bytes, the platform, and as far as they are known the
            ``user``, the ``trigger`` and ``run`` that started it, the ``commit`` of the code, and digests of the
            ``code`` and of the installed ``packages``.
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
    """The record of a finished directory, and the last file that is written into it.

    Its presence means that the directory is complete. It names the inputs by digest, states the digest of every tensor
    and file, and holds the stage's findings, so that an output can be verified and traced without the code that made
    it. The format is docs/format.md.

    Attributes:
        derivation: The stage, inputs and settings that the directory was made from. Its key decides whether a later run
            can reuse the directory.
        contents: Digests of every tensor and file.
        content_digest: ``contents.digest``. Later stages name this output by it.
        result: The stage's findings as JSON values: the padding map, per-module losses, check reports.
        recipe: Role -> path of each input that the weights are computed from, if they are not stored here;
            ``contents.tensors`` has the digests of the computed weights.
        run: Time, memory and environment of the run.
        format: Version of the format.
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
        CheckpointRefused: There is no manifest (the directory is unfinished, or was not made by this pipeline), it is
            damaged, or it has an older format.
    """
    path = root / MANIFEST
    if not path.is_file():
        raise CheckpointRefused(
            f"{root} has no {MANIFEST}: it is unfinished or was not made by this pipeline.",
            remedy="Run the stage that makes it; an interrupted run continues where it stopped.",
        )
    data = read_regular(path)
    if (found := _format(data)) in OUTDATED:
        raise CheckpointRefused(
            f"{path} has the format {found!r}; this version reads {FORMAT!r}.",
            remedy="Run its stage again into another directory, and delete this one: the weights are the same.",
        )
    if found != FORMAT:
        raise _damaged(path, f"format {found!a:.60}, expected {FORMAT!r}")
    try:
        parse_json(data)
        manifest = _MANIFEST.validate_json(data)
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if outside := [name for name in manifest.contents.files if not _is_below(name)]:
        raise _damaged(path, f"it names {outside[0]!r}, which is not a path below its directory")
    try:
        digest, _ = manifest.contents.digest, manifest.derivation.key
    except ValueError as error:
        raise _damaged(path, f"it has a value without canonical JSON ({error})") from error
    if manifest.content_digest != digest:
        raise _damaged(path, f"its content_digest is {manifest.content_digest}, its entries give {digest}")
    return manifest


def find_manifest(root: Path) -> Manifest | None:
    """Read a directory's manifest as :func:`open_manifest` does; return None if it has none."""
    return open_manifest(root) if (root / MANIFEST).is_file() else None


def is_outdated(root: Path) -> bool:
    """Return whether a finished directory has an older format. It then counts as absent, and is made again."""
    return (root / MANIFEST).is_file() and _format(read_regular(root / MANIFEST)) in OUTDATED


def describe_environment() -> dict[str, str]:
    """Return the versions of the packages that compute bytes, the platform, and who started the run through what."""
    return {name: found for name in ("qwen-pipeline", "torch", "safetensors") if (found := _version(name))} | {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **origin(),
    }


def _format(data: bytes) -> str | None:
    """Return the format that a manifest states, before it is validated."""
    try:
        return json.loads(data)["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_below(name: str) -> bool:
    """Return whether a relative path stays below the directory that it is joined to."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _damaged(path: Path, why: str) -> CheckpointRefused:
    return CheckpointRefused(
        f"{path} is damaged: {why}.", remedy="Delete the directory and run the stage again; the result is the same."
    )
