"""A base is hashed while it is read: the digest is that of a second read, and no byte is read twice."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_pipeline.checkpoint.digest import HashedTensor, hash_tensors
from qwen_pipeline.checkpoint.digest_cache import checkpoint_digest
from qwen_pipeline.checkpoint.hashing_reader import HashingReader
from qwen_pipeline.checkpoint.lazy import SINGLE_SHARD, Checkpoint, LazyTensor, open_checkpoint
from qwen_pipeline.checkpoint.measure import bytes_moved
from qwen_pipeline.checkpoint.safetensors_file import as_bytes
from qwen_pipeline.checkpoint.store.stage_input import open_input
from qwen_pipeline.checkpoint.thread_pool import map_ordered
from qwen_pipeline.checkpoint.tree_hash import TreeHash
from qwen_pipeline.checkpoint.writer import write_checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline_tests.checkpoint.copies import tree_digest
from qwen_pipeline_tests.in_memory import blocks_of

NOTHING = Checkpoint(config={}, tensors={}, shards={})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """One tensor of many leaves, one that is kept, and one that is not read."""
    root = tmp_path / "base"
    root.mkdir()
    tensors = {
        "changed.weight": torch.randn(2304, 4096, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "kept.weight": torch.arange(4096, dtype=torch.float32),
        "replaced.weight": torch.ones(7, 5),
    }
    save_file(tensors, root / SINGLE_SHARD)
    (root / "config.json").write_text("{}")
    return root


def format_digest(tensor: torch.Tensor) -> str:
    """Return the tensor digest of docs/format.md."""
    return tree_digest(bytes(as_bytes(tensor)))


def doubled(source: Checkpoint) -> Checkpoint:
    """Return a checkpoint with one tensor computed from the source's rows, one new and one unchanged."""
    changed = source.tensors["changed.weight"]
    twice = LazyTensor(spec=changed.spec, read=lambda start, stop: changed.read(start, stop) * 2)
    zeros = LazyTensor(spec=source["replaced.weight"], read=lambda start, stop: torch.zeros(stop - start, 5))
    return source.replace(tensors={"changed.weight": twice, "replaced.weight": zeros})


def read_rows(reader: HashingReader, parts: list[tuple[int, int]]) -> None:
    """Read rows of the changed tensor through a reader, each part in its own job."""

    def read(part: tuple[int, int]) -> None:
        reader.checkpoint.tensors["changed.weight"].read(*part)

    map_ordered(parts, read)


def test_tensors_get_the_digest_of_the_format_and_are_not_read_twice(base: Path, tmp_path: Path) -> None:
    source = open_checkpoint(base)
    reader = HashingReader("base", source)
    before = bytes_moved()[0]
    written = write_checkpoint(doubled(reader.checkpoint), tmp_path, task="", readers=[reader])
    read = bytes_moved()[0] - before

    stored = load_file(base / SINGLE_SHARD)
    assert {name: hashed.digest.tree_blake3 for name, hashed in reader.results.items()} == {
        name: format_digest(tensor) for name, tensor in stored.items()
    }
    assert written.tensors["kept.weight"] == reader.results["kept.weight"].digest
    assert written.tensors["changed.weight"] != reader.results["changed.weight"].digest
    assert source.nbytes <= read < source.nbytes + 2**20


def test_unchanged_tensors_are_hashed_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = doubled(open_checkpoint(base))
    reader = HashingReader("middle", source, check_finite=False)
    hashed: list[int] = []
    add = TreeHash.add

    def count(tree: TreeHash, start: int, view: memoryview) -> None:
        hashed.append(len(view))
        add(tree, start, view)

    monkeypatch.setattr(TreeHash, "add", count)
    written = write_checkpoint(reader.checkpoint, tmp_path, task="", readers=[reader])
    assert sum(hashed) == source.nbytes
    assert {name: hashed.digest for name, hashed in reader.results.items()} == written.tensors


def test_without_a_check_for_finite_values_the_result_is_unknown(base: Path, tmp_path: Path) -> None:
    reader = HashingReader("middle", open_checkpoint(base), check_finite=False)
    write_checkpoint(doubled(reader.checkpoint), tmp_path, task="", readers=[reader])
    assert reader.results["changed.weight"].finite is None


@pytest.mark.parametrize("size", [2**20, 3 * 2**20, 2**23])
def test_the_digest_does_not_depend_on_the_size_of_blocks(base: Path, size: int) -> None:
    source = open_checkpoint(base)
    expected = hash_tensors(source.tensors, task="")
    reader = HashingReader("base", source)
    with blocks_of(size):
        hash_tensors({"changed.weight": doubled(reader.checkpoint).tensors["changed.weight"]}, task="")
    assert reader.result("changed.weight") == expected["changed.weight"]
    assert reader.result("replaced.weight") is None


def test_rows_that_overlap_count_once_and_missing_rows_are_read_at_the_end(base: Path) -> None:
    source = open_checkpoint(base)
    expected = hash_tensors(source.tensors, task="")
    whole, partial = HashingReader("base", source), HashingReader("base", source)
    for reader, rows in ((whole, [(0, 900), (800, 2000), (1500, 2304)]), (partial, [(0, 900), (901, 2304)])):
        read_rows(reader, rows)
    assert whole.result("changed.weight") == expected["changed.weight"]
    assert partial.result("changed.weight") is None
    partial.finish(NOTHING, {}, task="")
    assert partial.results == expected


def test_results_of_an_earlier_attempt_are_not_computed_again(base: Path) -> None:
    source = open_checkpoint(base)
    expected = hash_tensors(source.tensors, task="")
    reader = HashingReader("base", source)
    for name, hashed in expected.items():
        reader.restore(name, hashed)
    (base / SINGLE_SHARD).unlink()
    reader.finish(NOTHING, {}, task="")
    assert reader.results == expected


def test_a_value_that_is_not_finite_is_found_while_reading(base: Path) -> None:
    tensors = load_file(base / SINGLE_SHARD)
    tensors["changed.weight"][2303, 4095] = float("nan")
    save_file(tensors, base / SINGLE_SHARD)
    reader = HashingReader("base", open_checkpoint(base))
    read_rows(reader, [(0, 1000), (1000, 2304)])
    hashed = reader.result("changed.weight")
    assert isinstance(hashed, HashedTensor)
    assert not hashed.finite


def test_the_digest_of_a_base_is_known_after_it_was_read_for_another_purpose(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    source = open_input("base", base)
    (reader,) = source.readers
    write_checkpoint(doubled(source.checkpoint), tmp_path / "out", task="", readers=[reader])
    found = source.final_digest()
    assert open_input("base", base).digest == found

    (tmp_path / "copy").mkdir()
    for file in base.iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    assert checkpoint_digest(tmp_path / "copy") == found


def test_a_base_that_changes_while_it_is_read_has_no_digest(base: Path, tmp_path: Path) -> None:
    source = open_input("base", base)
    write_checkpoint(doubled(source.checkpoint), tmp_path, task="", readers=source.readers)
    (base / "config.json").write_text(json.dumps({"model_type": "another"}))
    with pytest.raises(CheckpointRefused, match="was changed while it was read"):
        source.final_digest()
