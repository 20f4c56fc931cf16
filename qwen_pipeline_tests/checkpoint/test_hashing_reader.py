"""A base is digested on its way in: what is seen is what a second reading would find, and no byte is read twice."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_pipeline.checkpoint import digest
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
from qwen_pipeline_tests.checkpoint.test_tree_hash import naive

NOTHING = Checkpoint(config={}, tensors={}, shards={})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """One tensor of many blocks of a digest, one that stays, and one that nobody reads."""
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


def by_the_format(tensor: torch.Tensor) -> str:
    """docs/format.md, tensor digest."""
    return naive(bytes(as_bytes(tensor)))


def doubled(source: Checkpoint) -> Checkpoint:
    """Return a checkpoint with one tensor computed from the source's rows, one new, and one as it is."""
    changed = source.tensors["changed.weight"]
    twice = LazyTensor(spec=changed.spec, read=lambda start, stop: changed.read(start, stop) * 2)
    zeros = LazyTensor(spec=source["replaced.weight"], read=lambda start, stop: torch.zeros(stop - start, 5))
    return source.replace(tensors={"changed.weight": twice, "replaced.weight": zeros})


def pass_rows(reader: HashingReader, parts: list[tuple[int, int]]) -> None:
    """Read rows of the changed tensor past a tap, each part in a job of its own."""

    def read(part: tuple[int, int]) -> None:
        reader.checkpoint.tensors["changed.weight"].read(*part)

    map_ordered(parts, read)


def test_what_passed_has_the_digest_of_the_format_and_nothing_is_read_twice(base: Path, tmp_path: Path) -> None:
    source = open_checkpoint(base)
    reader = HashingReader("base", source)
    before = bytes_moved()[0]
    written = write_checkpoint(doubled(reader.checkpoint), tmp_path, task="", readers=[reader])
    read = bytes_moved()[0] - before

    stored = load_file(base / SINGLE_SHARD)
    assert {name: hashed.digest.tree_blake3 for name, hashed in reader.results.items()} == {
        name: by_the_format(tensor) for name, tensor in stored.items()
    }
    assert written.tensors["kept.weight"] == reader.results["kept.weight"].digest
    assert written.tensors["changed.weight"] != reader.results["changed.weight"].digest
    assert source.nbytes <= read < source.nbytes + 2**20


def test_what_passes_as_it_is_is_hashed_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = doubled(open_checkpoint(base))
    reader = HashingReader("middle", source, check_finite=False)
    hashed: list[int] = []
    add = TreeHash.add

    def counting(tree: TreeHash, start: int, view: memoryview) -> None:
        hashed.append(len(view))
        add(tree, start, view)

    monkeypatch.setattr(TreeHash, "add", counting)
    written = write_checkpoint(reader.checkpoint, tmp_path, task="", readers=[reader])
    assert sum(hashed) == source.nbytes
    assert {name: hashed.digest for name, hashed in reader.results.items()} == written.tensors


def test_a_tap_that_does_not_look_says_so(base: Path, tmp_path: Path) -> None:
    reader = HashingReader("middle", open_checkpoint(base), check_finite=False)
    write_checkpoint(doubled(reader.checkpoint), tmp_path, task="", readers=[reader])
    assert reader.results["changed.weight"].finite is None


@pytest.mark.parametrize("block_bytes", [2**20, 3 * 2**20, 2**23])
def test_whatever_rows_are_asked_for_together_the_digest_is_the_same(
    base: Path, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(base)
    expected = hash_tensors(source, source, task="")
    monkeypatch.setattr(digest, "BLOCK_BYTES", block_bytes)
    reader = HashingReader("base", source)
    hash_tensors(doubled(reader.checkpoint), ["changed.weight"], task="")
    assert reader.result("changed.weight") == expected["changed.weight"]
    assert reader.result("replaced.weight") is None


def test_rows_that_overlap_count_once_and_rows_that_never_came_are_read_at_the_end(base: Path) -> None:
    source = open_checkpoint(base)
    expected = hash_tensors(source, source, task="")
    whole, holed = HashingReader("base", source), HashingReader("base", source)
    for reader, rows in ((whole, [(0, 900), (800, 2000), (1500, 2304)]), (holed, [(0, 900), (901, 2304)])):
        pass_rows(reader, rows)
    assert whole.result("changed.weight") == expected["changed.weight"]
    assert holed.result("changed.weight") is None
    holed.finish(NOTHING, {}, task="")
    assert holed.results == expected


def test_what_an_earlier_attempt_saw_is_not_read_again(base: Path) -> None:
    source = open_checkpoint(base)
    expected = hash_tensors(source, source, task="")
    reader = HashingReader("base", source)
    for name, hashed in expected.items():
        reader.restore(name, hashed)
    (base / SINGLE_SHARD).unlink()
    reader.finish(NOTHING, {}, task="")
    assert reader.results == expected


def test_a_value_that_is_not_finite_is_noticed_on_its_way_in(base: Path) -> None:
    tensors = load_file(base / SINGLE_SHARD)
    tensors["changed.weight"][2303, 4095] = float("nan")
    save_file(tensors, base / SINGLE_SHARD)
    reader = HashingReader("base", open_checkpoint(base))
    pass_rows(reader, [(0, 1000), (1000, 2304)])
    hashed = reader.result("changed.weight")
    assert isinstance(hashed, HashedTensor)
    assert not hashed.finite


def test_a_base_that_was_read_for_something_else_is_known_from_then_on(base: Path, tmp_path: Path) -> None:
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
