"""Comparison of a finished directory with its manifest, byte for byte."""

from collections.abc import Callable
from pathlib import Path

from qwen_pipeline.checkpoint.store.canonical import ATTESTATIONS, MANIFEST_FILE
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.lineage.verification.hashing import FileHash, can_hash_tensors, hash_files
from qwen_pipeline.lineage.verification.records import Record

RELEASE = "published"


def files_below(root: Path, *, attestations: bool = False) -> dict[str, Path]:
    """Return relative path -> file, without the manifest and, unless they are asked for, what joined it later.

    Links count as the files that they lead to. A link that leads nowhere, or to a directory, counts too: what is in
    that directory is not below this one.
    """
    left_out = {MANIFEST_FILE, *(() if attestations else ATTESTATIONS)}
    paths = (path for path in sorted(root.rglob("*")) if path.is_symlink() or not path.is_dir())
    return {name: path for path in paths if (name := path.relative_to(root).as_posix()) not in left_out}


def compare(record: Record, *, observe: Callable[[int], None] = lambda _: None) -> dict[str, str]:
    """Read every file of a directory once; return path -> the difference, of each that is not as the manifest states.

    A shard of a release is compared by its SHA-256 and, with ``blake3``, tensor by tensor. A recipe has no shards.

    Args:
        record: The manifest.
        observe: Called with the bytes read.

    Raises:
        CheckpointRefused: A shard has digests of its tensors alone, and ``blake3`` is not installed.
    """
    present, expected = files_below(record.root), record.files
    wrong = dict.fromkeys(expected.keys() - present.keys(), "is missing")
    wrong |= dict.fromkeys(present.keys() - expected.keys(), "is not in the manifest")
    wrong |= {
        path: f"is listed, but {path.rpartition('/')[2]} is no file"
        for path in expected.keys() & present.keys()
        if not present[path].is_file()
    }
    readable = {path: present[path] for path in expected.keys() & present.keys() if path not in wrong}
    if not can_hash_tensors() and (unread := [path for path in readable if "sha256" not in expected[path]]):
        raise CheckpointRefused(
            f"{record.root / unread[0]} has digests of its tensors alone, which need the package blake3.",
            remedy="Install blake3, or verify the release.",
        )
    hashed = hash_files(readable, whole=lambda path: "sha256" in expected[path], observe=observe)
    tensors: dict[str, tuple[str, list[int], str]] = {}
    for path, found in hashed.items():
        if isinstance(found, CheckpointRefused):
            wrong[path] = found.what
        elif difference := _difference(found, record, path):
            wrong[path] = difference
        elif path.endswith(".safetensors"):
            wrong |= _other_tensors(path, found, record)
            tensors |= found.tensors
    if not wrong and record.stored and can_hash_tensors() and (lost := record.tensors.keys() - tensors.keys()):
        wrong["tensors"] = f"{sorted(lost)[0]} is in no file"
    return wrong


def _difference(found: FileHash, record: Record, path: str) -> str | None:
    expected = record.files[path]
    for field, actual in (("bytes", found.bytes), ("sha256", found.sha256), ("header_sha256", found.header_sha256)):
        if field in expected and expected[field] != actual:
            return f"has {field} {actual}, its manifest states {expected[field]}"
    return None


def _other_tensors(path: str, found: FileHash, record: Record) -> dict[str, str]:
    """Return the first tensor of a file that has another dtype, shape or digest than the manifest states."""
    for name, tensor in found.tensors.items():
        if record.tensors and record.tensors.get(name) != tensor:
            return {path: f"holds another {name} than its manifest states"}
    return {}
