"""Stream a checkpoint to disk, block by block over a few threads, in memory that does not grow with the model.

A tensor whose bytes are on disk enters a journal. A later attempt hashes what the journal names and continues after it.
A shard of which nothing changed is not written at all where the disk can share its blocks.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from qwen_pipeline.checkpoint.digest import (
    Block,
    PassingTensor,
    SeenTensor,
    blocks_of,
    digest_file,
    digest_shard,
    known_checkpoint,
)
from qwen_pipeline.checkpoint.files import share_file, write_bytes
from qwen_pipeline.checkpoint.hashing_reader import HashingReader
from qwen_pipeline.checkpoint.journal import FinishedTensor, Journal, still_there
from qwen_pipeline.checkpoint.lazy import CONFIG, INDEX, SINGLE_SHARD, Checkpoint
from qwen_pipeline.checkpoint.manifest import Contents
from qwen_pipeline.checkpoint.memory_budget import needs_of, require_resources
from qwen_pipeline.checkpoint.page_cache import outgrows_cache
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
    observe: Observe = unobserved,
) -> Contents:
    """Write weights, index, config and sidecars into ``out`` and return the digests of what was written.

    Shards keep the names and the tensor order of the checkpoint. ``out`` may hold an earlier, interrupted attempt at
    the same derivation; what it finished is verified and kept.

    Args:
        checkpoint: What to write.
        out: An existing directory.
        task: What the progress is called.
        readers: Settled at the end: what passed them is kept across interruptions, what did not is read.
        if_not_finite: What to do about a NaN or an infinity, for the reader; without it they are written.
        hard_links: Whether a shard of which nothing changed may become a second name of its source's file.
        observe: Told about bytes.

    Raises:
        CheckFailed: A value is not finite.
        EnvironmentFault: The disk has less room than what is still to be written needs.
    """
    for reader in readers:
        reader.leave_to(checkpoint)
    writing = _Writing(checkpoint, out, readers, if_not_finite)
    writing.carry_unchanged(hard_links=hard_links)
    writing.keep_finished(task=f"{task}: verify what is there", observe=observe)
    writing.write(task=task, observe=observe)
    for reader in readers:
        reader.settle(checkpoint, writing.seen, task=f"{task}: digest what was not needed", observe=observe)
    files = {shard: digest_shard(out / shard) for shard in writing.shards}
    files |= {path: digest_file(out / path) for path in write_files_beside(checkpoint, out)}
    files |= {path: digest_file(out / path) for path in _write_index(checkpoint, out)}
    return Contents(tensors={name: writing.seen[name].digest for name in writing.names}, files=files)


@dataclass(slots=True)
class _Passage:
    """One tensor on its way; without a shard it is only looked at, since its file is there.

    Attributes:
        left: Bytes that are still to be written and looked at.
    """

    name: str
    shard: ShardFile | None
    tensor: PassingTensor
    left: int


class _Writing:
    """One attempt at filling one directory.

    Attributes:
        shards: File name -> its tensors, in the order of their bytes.
        seen: Every tensor that is there, or of which nothing needs to be read again.
    """

    def __init__(
        self, checkpoint: Checkpoint, out: Path, readers: Sequence[HashingReader], if_not_finite: str | None
    ) -> None:
        self._checkpoint, self._out, self._readers, self._if_not_finite = checkpoint, out, readers, if_not_finite
        self.shards: dict[str, list[str]] = {}
        for name in checkpoint:
            self.shards.setdefault(checkpoint.shards[name], []).append(name)
        self.names = [name for names in self.shards.values() for name in names]
        self.seen: dict[str, SeenTensor] = {}
        self._journal = Journal(out)
        self._finished = self._journal.read()
        cached = not outgrows_cache(checkpoint.nbytes)
        self._files = {
            shard: ShardFile(out / shard, {name: checkpoint[name] for name in names}, cached=cached)
            for shard, names in self.shards.items()
        }
        self._lock = Lock()

    def carry_unchanged(self, *, hard_links: bool) -> None:
        """Share the file of each shard of which nothing changed, where the disk can."""
        for shard in self.shards:
            source = self._unchanged(shard)
            if source and share_file(source.path, self._out / shard, hard_links=hard_links):
                del self._files[shard]
                self._recall(shard, source)

    def keep_finished(self, *, task: str, observe: Observe) -> None:
        """Verify what an earlier attempt wrote, and keep it."""
        claimed = {
            file.found: [self._finished[name] for name in self.shards[shard] if name in self._finished]
            for shard, file in self._files.items()
        }
        for name in still_there(claimed, task=task, observe=observe):
            self._keep(self._finished[name])

    def write(self, *, task: str, observe: Observe) -> None:
        """Write, or look at, every tensor that was not seen yet."""
        self._require_admitted()
        done = sum(self._checkpoint[name].nbytes for name in self.seen)
        meter = Meter(task, self._checkpoint.nbytes, observe, done=done)
        meter.tell()

        def pass_on(job: tuple[_Passage, Block]) -> None:
            meter.add(self._pass_on(*job))

        try:
            map_ordered(self._blocks(), pass_on, tick=meter.tell)
        finally:
            for file in self._files.values():
                file.close()

    def _blocks(self) -> Iterator[tuple[_Passage, Block]]:
        for shard, names in self.shards.items():
            file, missing = self._files.get(shard), [name for name in names if name not in self.seen]
            if file and not (file.is_finished and not missing):
                file.begin(missing)
            for name in missing:
                spec = self._checkpoint[name]
                passage = _Passage(name, file, PassingTensor(spec), left=spec.nbytes)
                for block in blocks_of(self._checkpoint.tensors[name]):
                    yield passage, block

    def _pass_on(self, passage: _Passage, block: Block) -> int:
        """Compute one block, write it, look at it; return how many bytes it has."""
        name, spec = passage.name, self._checkpoint[passage.name]
        loaded = block.load()
        assert loaded.dtype == spec.torch_dtype, f"{name}: {loaded.dtype} where {spec.dtype} was promised"
        end = block.start + loaded.nbytes
        assert end <= spec.nbytes, f"{name}: {end} bytes where {spec.nbytes} were promised"
        if passage.shard:
            passage.shard.write(name, block.start, as_bytes(loaded))
        if not passage.tensor.see(block.start, loaded) and self._if_not_finite:
            raise CheckFailed(f"{name} has values that are not finite.", remedy=self._if_not_finite)
        with self._lock:
            passage.left -= loaded.nbytes
            is_last = not passage.left
        if is_last:
            self._complete(passage)
        return loaded.nbytes

    def _complete(self, passage: _Passage) -> None:
        """Note a tensor whose every block was written and looked at."""
        seen = passage.tensor.seen
        assert seen, f"{passage.name} was not written from end to end"
        passed = {reader.name: noted for reader in self._readers if (noted := reader.note(passage.name))}
        line = FinishedTensor(name=passage.name, written=seen, passed=passed)
        with self._lock:
            self._journal.append(line)
            self.seen[passage.name] = seen
        if passage.shard:
            passage.shard.complete(passage.name)

    def _unchanged(self, shard: str) -> SafetensorsFile | None:
        """Return the file whose tensors, all of them and under the same names, are those of a shard."""
        stored = {name: self._checkpoint.tensors[name].stored for name in self.shards[shard]}
        files = {id(place.file): place.file for place in stored.values() if place}
        if len(files) != 1:
            return None
        (file,) = files.values()
        same = (
            all(place and place.name == name for name, place in stored.items()) and stored.keys() == file.specs.keys()
        )
        return file if same else None

    def _recall(self, shard: str, source: SafetensorsFile) -> None:
        """Use what is known of a shared file's tensors, unless they must be finite and nobody looked."""
        known = known_checkpoint(source.path.parent)
        for name in self.shards[shard]:
            seen = known.tensors.get(name) if known else None
            if seen and (seen.finite or not self._if_not_finite):
                self.seen[name] = seen
            elif name in self._finished:
                self._keep(self._finished[name])

    def _keep(self, finished: FinishedTensor) -> None:
        self.seen[finished.name] = finished.written
        for reader in self._readers:
            if reader.name in finished.passed:
                reader.recall(finished.name, finished.passed[reader.name])

    def _require_admitted(self) -> None:
        unwritten = [name for shard in self._files for name in self.shards[shard] if name not in self.seen]
        disk_bytes = sum(self._checkpoint[name].nbytes for name in unwritten)
        require_resources(needs_of(self._checkpoint, disk_bytes=disk_bytes), self._out)


def write_files_beside(checkpoint: Checkpoint, out: Path) -> list[str]:
    """Write config and sidecars; return their relative paths."""
    dumped = json.dumps(checkpoint.config, indent=2, ensure_ascii=False).encode() + b"\n"
    write_bytes(out / CONFIG, checkpoint.config_bytes or dumped)
    for relative, source in checkpoint.sidecars.items():
        write_bytes(out / relative, source.read_bytes())
    return [CONFIG, *checkpoint.sidecars]


def _write_index(checkpoint: Checkpoint, out: Path) -> list[str]:
    if set(checkpoint.shards.values()) == {SINGLE_SHARD}:
        return []
    index = {
        "metadata": {"total_size": checkpoint.nbytes},
        "weight_map": {name: checkpoint.shards[name] for name in sorted(checkpoint)},
    }
    write_bytes(out / INDEX, json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n")
    return [INDEX]
