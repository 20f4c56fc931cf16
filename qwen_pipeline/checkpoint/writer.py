"""Stream a checkpoint to disk, block by block on a few threads, in memory that does not grow with the model.

Each tensor whose bytes are on disk is recorded in a journal. A later attempt verifies these tensors and writes the
rest. A shard in which nothing changed is not written at all where the file system can share its blocks.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from qwen_pipeline.checkpoint.digest import (
    Block,
    HashedTensor,
    HashedTensors,
    TensorHasher,
    blocks_of,
    digest_file,
    digest_files,
    digest_shard,
    hash_tensors,
)
from qwen_pipeline.checkpoint.digest_cache import DigestCache
from qwen_pipeline.checkpoint.files import share_file, write_bytes
from qwen_pipeline.checkpoint.hashing_reader import HashingReader
from qwen_pipeline.checkpoint.journal import FinishedTensor, Journal, verify_finished
from qwen_pipeline.checkpoint.lazy import CONFIG, INDEX, SINGLE_SHARD, Checkpoint
from qwen_pipeline.checkpoint.manifest import Contents
from qwen_pipeline.checkpoint.memory_budget import needs_of, require_resources
from qwen_pipeline.checkpoint.page_cache import exceeds_page_cache
from qwen_pipeline.checkpoint.safetensors_file import SafetensorsFile, as_bytes
from qwen_pipeline.checkpoint.shard_file import ShardFile
from qwen_pipeline.checkpoint.thread_pool import map_ordered
from qwen_pipeline.errors import CheckFailed
from qwen_pipeline.progress import Meter, Observe, unobserved


def write_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    *,
    task: str,
    readers: Sequence[HashingReader] = (),
    if_not_finite: str | None = None,
    hard_links: bool = False,
    config_name: str = CONFIG,
    observe: Observe = unobserved,
) -> Contents:
    """Write weights, index, config and sidecars into ``out`` and return the digests of what was written.

    Shards keep the names and the tensor order of the checkpoint. ``out`` may hold an earlier, interrupted attempt at
    the same derivation; the tensors that it finished are verified and kept.

    Args:
        checkpoint: The checkpoint to write.
        out: An existing directory.
        task: Name of the progress.
        readers: Readers of the inputs. They are finished at the end; their results so far survive an interruption.
        if_not_finite: The remedy for a NaN or an infinity. Without it, such values are written.
        hard_links: Whether a shard in which nothing changed may become a hard link to its source's file.
        config_name: The config's file name.
        observe: Called with the progress, in bytes.

    Raises:
        CheckFailed: A value is not finite, and ``if_not_finite`` is given.
        EnvironmentFault: The disk has less free space than the rest of the checkpoint takes.
    """
    for reader in readers:
        reader.skip_unchanged(checkpoint)
    writer = _CheckpointWriter(checkpoint, out, readers, if_not_finite)
    writer.share_unchanged(hard_links=hard_links)
    writer.keep_finished(task=f"{task}: verify finished tensors", observe=observe)
    writer.write(task=task, observe=observe)
    for reader in readers:
        reader.finish(checkpoint, writer.results, task=f"{task}: hash unread tensors", observe=observe)
    files = {shard: digest_shard(out / shard) for shard in writer.shards}
    files |= {path: digest_file(out / path) for path in write_config_and_sidecars(checkpoint, out, config_name)}
    files |= {path: digest_file(out / path) for path in _write_index(checkpoint, out, config_name)}
    return Contents(tensors={name: writer.results[name].digest for name in writer.names}, files=files)


def write_recipe(
    checkpoint: Checkpoint,
    out: Path,
    *,
    task: str,
    readers: Sequence[HashingReader] = (),
    if_not_finite: str | None = None,
    config_name: str = CONFIG,
    observe: Observe = unobserved,
) -> Contents:
    """Compute and hash every tensor, but write only config and sidecars into ``out``; see :func:`write_checkpoint`.

    Raises:
        CheckFailed: A value is not finite, and ``if_not_finite`` is given.
    """
    for reader in readers:
        reader.skip_unchanged(checkpoint)
    tensors = hash_tensors(checkpoint.tensors, task=task, observe=observe)
    if if_not_finite and (faulty := [name for name, tensor in tensors.items() if not tensor.finite]):
        raise CheckFailed(f"{faulty[0]} has values that are not finite.", remedy=if_not_finite)
    for reader in readers:
        reader.finish(checkpoint, tensors, task=f"{task}: hash unread tensors", observe=observe)
    return without_weights(checkpoint, out, tensors, config_name)


def without_weights(checkpoint: Checkpoint, out: Path, tensors: HashedTensors, config_name: str = CONFIG) -> Contents:
    """Write only config and sidecars; return the contents of a recipe with these hash results of its tensors."""
    files = {path: out / path for path in write_config_and_sidecars(checkpoint, out, config_name)}
    return Contents(tensors={name: tensor.digest for name, tensor in tensors.items()}, files=digest_files(files))


@dataclass(slots=True)
class _UnfinishedTensor:
    """A tensor with missing blocks. Without a shard it is only hashed, since its file exists already.

    Attributes:
        missing: Bytes that are still to be written and hashed.
    """

    name: str
    shard: ShardFile | None
    hasher: TensorHasher
    missing: int


class _CheckpointWriter:
    """One attempt at writing one directory.

    Attributes:
        shards: File name -> its tensors, in the order of their bytes.
        results: The hash result of every tensor that is written and need not be read again.
    """

    def __init__(
        self, checkpoint: Checkpoint, out: Path, readers: Sequence[HashingReader], if_not_finite: str | None
    ) -> None:
        self._checkpoint, self._out, self._readers, self._if_not_finite = checkpoint, out, readers, if_not_finite
        self.shards: dict[str, list[str]] = {}
        for name in checkpoint:
            self.shards.setdefault(checkpoint.shards[name], []).append(name)
        self.names = [name for names in self.shards.values() for name in names]
        self.results: dict[str, HashedTensor] = {}
        self._journal = Journal(out)
        self._finished = self._journal.read()
        cached = not exceeds_page_cache(checkpoint.nbytes)
        self._files = {
            shard: ShardFile(out / shard, {name: checkpoint[name] for name in names}, cached=cached)
            for shard, names in self.shards.items()
        }
        self._lock = Lock()

    def share_unchanged(self, *, hard_links: bool) -> None:
        """Share the file of each shard in which nothing changed, where the file system can."""
        for shard in self.shards:
            source = self._unchanged_file(shard)
            if source and share_file(source.path, self._out / shard, hard_links=hard_links):
                del self._files[shard]
                self._keep_shared(shard, source)

    def keep_finished(self, *, task: str, observe: Observe) -> None:
        """Verify the tensors that an earlier attempt wrote, and keep them."""
        claimed = {
            file.existing: [self._finished[name] for name in self.shards[shard] if name in self._finished]
            for shard, file in self._files.items()
        }
        for name in verify_finished(claimed, task=task, observe=observe):
            self._keep(self._finished[name])

    def write(self, *, task: str, observe: Observe) -> None:
        """Write and hash every tensor without a result; only hash those of shared files."""
        self._require_resources()
        done = sum(self._checkpoint[name].nbytes for name in self.results)
        meter = Meter(task, self._checkpoint.nbytes, observe, done=done)
        meter.report()

        def write_block(job: tuple[_UnfinishedTensor, Block]) -> None:
            meter.add(self._write_block(*job))

        try:
            map_ordered(self._blocks(), write_block, tick=meter.report)
        finally:
            for file in self._files.values():
                file.close()

    def _blocks(self) -> Iterator[tuple[_UnfinishedTensor, Block]]:
        for shard, names in self.shards.items():
            file, missing = self._files.get(shard), [name for name in names if name not in self.results]
            if file and not (file.is_finished and not missing):
                file.begin(missing)
            for name in missing:
                spec = self._checkpoint[name]
                unfinished = _UnfinishedTensor(name, file, TensorHasher(spec), missing=spec.nbytes)
                for block in blocks_of(self._checkpoint.tensors[name]):
                    yield unfinished, block

    def _write_block(self, tensor: _UnfinishedTensor, block: Block) -> int:
        """Compute one block, write it and hash it; return its number of bytes."""
        name, spec = tensor.name, self._checkpoint[tensor.name]
        loaded = block.load()
        assert loaded.dtype == spec.torch_dtype, f"{name}: expected {spec.dtype}, got {loaded.dtype}"
        end = block.start + loaded.nbytes
        assert end <= spec.nbytes, f"{name}: expected {spec.nbytes} bytes, got {end}"
        if tensor.shard:
            tensor.shard.write(name, block.start, as_bytes(loaded))
        if not tensor.hasher.update(block.start, loaded) and self._if_not_finite:
            raise CheckFailed(f"{name} has values that are not finite.", remedy=self._if_not_finite)
        with self._lock:
            tensor.missing -= loaded.nbytes
            is_last = not tensor.missing
        if is_last:
            self._finish(tensor)
        return loaded.nbytes

    def _finish(self, tensor: _UnfinishedTensor) -> None:
        """Record a tensor in the journal after its last block was written and hashed."""
        result = tensor.hasher.result
        assert result, f"{tensor.name} was not written to its end"
        passed = {reader.name: found for reader in self._readers if (found := reader.result(tensor.name))}
        line = FinishedTensor(name=tensor.name, written=result, passed=passed)
        with self._lock:
            self._journal.append(line)
            self.results[tensor.name] = result
        if tensor.shard:
            tensor.shard.complete(tensor.name)

    def _unchanged_file(self, shard: str) -> SafetensorsFile | None:
        """Return the source's file that has exactly the tensors of a shard, under the same names."""
        stored = {name: self._checkpoint.tensors[name].stored for name in self.shards[shard]}
        files = {id(source.file): source.file for source in stored.values() if source}
        if len(files) != 1:
            return None
        (file,) = files.values()
        is_same = stored.keys() == file.specs.keys() and all(
            source and source.name == name for name, source in stored.items()
        )
        return file if is_same else None

    def _keep_shared(self, shard: str, source: SafetensorsFile) -> None:
        """Use known results of a shared file's tensors, unless they must be finite and that was not checked."""
        known = DigestCache().find(source.path.parent)
        for name in self.shards[shard]:
            result = known.tensors.get(name) if known else None
            if result and (result.finite or not self._if_not_finite):
                self.results[name] = result
            elif name in self._finished:
                self._keep(self._finished[name])

    def _keep(self, finished: FinishedTensor) -> None:
        self.results[finished.name] = finished.written
        for reader in self._readers:
            if reader.name in finished.passed:
                reader.restore(finished.name, finished.passed[reader.name])

    def _require_resources(self) -> None:
        unwritten = [name for shard in self._files for name in self.shards[shard] if name not in self.results]
        disk_bytes = sum(self._checkpoint[name].nbytes for name in unwritten)
        require_resources(needs_of(self._checkpoint, disk_bytes=disk_bytes), self._out)


def write_config_and_sidecars(checkpoint: Checkpoint, out: Path, config_name: str = CONFIG) -> list[str]:
    """Write config and sidecars; return their relative paths."""
    dumped = json.dumps(checkpoint.config, indent=2, ensure_ascii=False).encode() + b"\n"
    write_bytes(out / config_name, checkpoint.config_bytes or dumped)
    for relative, source in checkpoint.sidecars.items():
        write_bytes(out / relative, source.read_bytes())
    return [config_name, *checkpoint.sidecars]


def _write_index(checkpoint: Checkpoint, out: Path, config_name: str) -> list[str]:
    if config_name != CONFIG or set(checkpoint.shards.values()) == {SINGLE_SHARD}:
        return []
    index = {
        "metadata": {"total_size": checkpoint.nbytes},
        "weight_map": {name: checkpoint.shards[name] for name in sorted(checkpoint)},
    }
    write_bytes(out / INDEX, json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n")
    return [INDEX]
