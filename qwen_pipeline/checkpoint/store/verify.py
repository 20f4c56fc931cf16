"""Hashing a directory, and comparing a finished one with its manifest."""

from pathlib import Path

from qwen_pipeline.checkpoint.digest import digest_file, digest_shard, hash_checkpoint
from qwen_pipeline.checkpoint.lazy import CONFIG, MANIFEST, open_checkpoint
from qwen_pipeline.checkpoint.manifest import (
    Contents,
    Manifest,
    ShardDigest,
    open_manifest,
)
from qwen_pipeline.checkpoint.store.canonical import ATTESTATIONS
from qwen_pipeline.errors import CheckpointRefused


def contents_of_directory(root: Path) -> Contents:
    """Hash a directory that a library wrote: every file, and every tensor if it is a checkpoint."""
    files = _files_below(root)
    if CONFIG not in files or not any(path.endswith(".safetensors") for path in files):
        return Contents(tensors={}, files={path: digest_file(file) for path, file in files.items()})
    checkpoint = open_checkpoint(root)
    shards = set(checkpoint.shards.values())
    digests = {path: (digest_shard if path in shards else digest_file)(file) for path, file in files.items()}
    return Contents(tensors=hash_checkpoint(checkpoint, root).tensors, files=digests)


def require_intact(root: Path) -> Manifest:
    """Read every file of a finished directory, each byte once, and compare it with the manifest.

    Raises:
        CheckpointRefused: A file is missing, was added or was changed.
    """
    manifest = open_manifest(root)
    expected, files = manifest.contents.files, _files_below(root)
    shards = {path for path, file in expected.items() if isinstance(file, ShardDigest)}
    found = {path: (digest_shard if path in shards else digest_file)(file) for path, file in files.items()}
    wrong = {path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path)}
    if not wrong and shards:
        checkpoint = open_checkpoint(root)
        tensors = hash_checkpoint(checkpoint, root).tensors
        wrong = {checkpoint.shards[name] for name in tensors if tensors[name] != manifest.contents.tensors.get(name)}
    if wrong:
        raise CheckpointRefused(
            f"{root} does not match its manifest; these files differ: {', '.join(sorted(wrong)[:5])}.",
            remedy="Delete the directory and run its stage again; the result is the same.",
        )
    return manifest


def _files_below(root: Path) -> dict[str, Path]:
    """Return relative path -> file, without the manifest, what joins a release when it is signed, and hidden files."""
    return {
        path.relative_to(root).as_posix(): path
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and not path.name.startswith(".")
        and path.relative_to(root).as_posix() not in (MANIFEST, *ATTESTATIONS)
    }
