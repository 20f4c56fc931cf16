"""Stream a checkpoint to disk, shard by shard, in memory that does not grow with the model.

A shard is written under a temporary name, synced, renamed and entered in a journal. A later attempt verifies the
journal's shards and continues after them; at most one shard is written again.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import TypeAdapter

from qwen_pipeline.checkpoint.digest import as_bytes, digest_file, row_blocks
from qwen_pipeline.checkpoint.lazy import CONFIG, INDEX, SINGLE_SHARD, Checkpoint
from qwen_pipeline.checkpoint.manifest import Contents, FileDigest, TensorDigest
from qwen_pipeline.checkpoint.safetensors_file import header_bytes
from qwen_pipeline.errors import EnvironmentFault
from qwen_pipeline.progress import Observe, Progress, unobserved

JOURNAL = ".journal.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenShard:
    """One line of the journal."""

    shard: str
    file: FileDigest
    tensors: Mapping[str, TensorDigest]


_SHARD = TypeAdapter(WrittenShard)


def write_checkpoint(checkpoint: Checkpoint, out: Path, *, task: str, observe: Observe = unobserved) -> Contents:
    """Write weights, index, config and sidecars into ``out`` and return the digests of what was written.

    Shards keep the names and the tensor order of the checkpoint. ``out`` may hold shards of an earlier, interrupted
    attempt at the same derivation; they are verified against the journal and kept.

    Raises:
        EnvironmentFault: The disk has less room than the shards that are still to be written need.
    """
    finished = _verified_journal(out)
    names_by_shard = _tensors_by_shard(checkpoint)
    missing = {shard: names for shard, names in names_by_shard.items() if shard not in finished}
    _require_room(out, sum(checkpoint[name].nbytes for names in missing.values() for name in names))

    total = checkpoint.nbytes
    done = total - sum(checkpoint[name].nbytes for names in missing.values() for name in names)
    observe(Progress(task=task, done=done, total=total, unit="bytes"))
    for shard, names in missing.items():
        with _replacing(out / shard) as file:
            written = _write_shard(checkpoint, shard, names, file, Meter(task, done, total, observe))
        done += sum(checkpoint[name].nbytes for name in names)
        _append(out / JOURNAL, _SHARD.dump_json(written) + b"\n")
        finished[shard] = written

    files = {shard: finished[shard].file for shard in names_by_shard}
    files |= {path: digest_file(out / path) for path in _write_files_beside(checkpoint, out)}
    tensors = {name: digest for shard in names_by_shard for name, digest in finished[shard].tensors.items()}
    return Contents(tensors=tensors, files=files)


@dataclass(slots=True)
class Meter:
    """Counts bytes within one task and tells the observer."""

    task: str
    done: int
    total: int
    observe: Observe

    def add(self, count: int) -> None:
        self.done += count
        self.observe(Progress(task=self.task, done=self.done, total=self.total, unit="bytes"))


def _write_shard(checkpoint: Checkpoint, shard: str, names: list[str], file: BinaryIO, meter: Meter) -> WrittenShard:
    file_sha = hashlib.sha256()
    header = header_bytes({name: checkpoint[name] for name in names})
    file_sha.update(header)
    size = file.write(header)
    tensors: dict[str, TensorDigest] = {}
    for name in names:
        spec, tensor_sha, written = checkpoint[name], hashlib.sha256(), 0
        for block in row_blocks(checkpoint, name):
            assert block.dtype == spec.torch_dtype, f"{name}: {block.dtype} where {spec.dtype} was promised"
            view = as_bytes(block)
            tensor_sha.update(view)
            file_sha.update(view)
            written += file.write(view)
            meter.add(len(view))
        assert written == spec.nbytes, f"{name}: {written} bytes where {spec.nbytes} were promised"
        tensors[name] = TensorDigest(dtype=spec.dtype, shape=spec.shape, sha256=tensor_sha.hexdigest())
        size += written
    return WrittenShard(shard=shard, file=FileDigest(bytes=size, sha256=file_sha.hexdigest()), tensors=tensors)


def _write_files_beside(checkpoint: Checkpoint, out: Path) -> list[str]:
    """Write index, config and sidecars; return their relative paths."""
    written = [CONFIG, *checkpoint.sidecars]
    if checkpoint.config_file:
        write_bytes(out / CONFIG, checkpoint.config_file.read_bytes())
    else:
        write_bytes(out / CONFIG, json.dumps(checkpoint.config, indent=2, ensure_ascii=False).encode() + b"\n")
    for relative, source in checkpoint.sidecars.items():
        write_bytes(out / relative, source.read_bytes())
    if set(checkpoint.shards.values()) != {SINGLE_SHARD}:
        index = {
            "metadata": {"total_size": checkpoint.nbytes},
            "weight_map": {name: checkpoint.shards[name] for name in sorted(checkpoint)},
        }
        write_bytes(out / INDEX, json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n")
        written.append(INDEX)
    return written


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file so that after a crash it is either absent or complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as file:
        file.write(data)


def sync_directory(path: Path) -> None:
    """Make renames and new names within a directory survive a crash."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _replacing(path: Path) -> Generator[BinaryIO, None, None]:
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    sync_directory(path.parent)


def _append(path: Path, line: bytes) -> None:
    with path.open("ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _verified_journal(out: Path) -> dict[str, WrittenShard]:
    """Return the journal's shards whose files still have the digests written down; a torn last line is ignored."""
    if not (out / JOURNAL).is_file():
        return {}
    lines = (out / JOURNAL).read_bytes().splitlines(keepends=True)
    entries = [_SHARD.validate_json(line) for line in lines if line.endswith(b"\n")]
    return {e.shard: e for e in entries if (out / e.shard).is_file() and digest_file(out / e.shard) == e.file}


def _tensors_by_shard(checkpoint: Checkpoint) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name in checkpoint:
        names.setdefault(checkpoint.shards[name], []).append(name)
    return names


def _require_room(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        raise EnvironmentFault(
            f"{out} needs {needed / 1e9:.2f} GB more, its disk has {free / 1e9:.2f} GB free.",
            remedy="Free disk space or choose another destination; finished shards are kept and not written again.",
        )
