"""The reference library reads what the writer writes; an interrupted write continues to the same bytes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen_pipeline.checkpoint import writer
from qwen_pipeline.checkpoint.digest import hash_checkpoint
from qwen_pipeline.checkpoint.lazy import MANIFEST, Checkpoint, LazyTensor, open_checkpoint
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.checkpoint.store.verify import require_intact
from qwen_pipeline.errors import EnvironmentFault
from qwen_pipeline_tests import REPOSITORY
from qwen_pipeline_tests.checkpoint.copies import copy, flip_bit
from qwen_pipeline_tests.in_memory import blocks_of


def test_a_copy_has_the_same_tensors_files_and_digest(sharded: Path, tmp_path: Path) -> None:
    source = open_checkpoint(sharded)

    with blocks_of(64):
        made = copy(sharded, tmp_path / "out")

    for shard in set(source.shards.values()):
        expected, found = load_file(sharded / shard), load_file(made.path / shard)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (made.path / "config.json").read_bytes() == (sharded / "config.json").read_bytes()
    assert not (made.path / "README.md").exists()
    assert source.left_behind == ("README.md",)
    assert made.manifest.content_digest == hash_checkpoint(source, sharded).digest
    assert require_intact(made.path) == made.manifest


def test_a_checkpoint_written_past_the_page_cache_has_the_same_files(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = copy(sharded, tmp_path / "cached")
    monkeypatch.setattr(writer, "exceeds_page_cache", lambda _: True)

    uncached = copy(sharded, tmp_path / "uncached")

    assert uncached.manifest.contents == cached.manifest.contents
    assert require_intact(uncached.path) == uncached.manifest


def test_a_second_run_writes_nothing(sharded: Path, tmp_path: Path) -> None:
    first = copy(sharded, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in first.path.iterdir()}

    second = copy(sharded, tmp_path / "out")

    assert second.reused
    assert second.manifest == first.manifest
    assert {path: path.stat().st_mtime_ns for path in first.path.iterdir()} == before


def test_the_digest_does_not_depend_on_the_shard_layout(sharded: Path, tmp_path: Path) -> None:
    source = open_checkpoint(sharded)
    single = Checkpoint(
        config=source.config,
        config_bytes=source.config_bytes,
        tensors=dict(reversed(list(source.tensors.items()))),
        shards=dict.fromkeys(source, "model.safetensors"),
        sidecars=source.sidecars,
    )
    (tmp_path / "one").mkdir()

    written = writer.write_checkpoint(single, tmp_path / "one", task="")
    assert written.digest == hash_checkpoint(source, sharded).digest
    assert open_checkpoint(tmp_path / "one").keys() == source.keys()


def killed_copy(source: Path, out: Path, at_sync: int) -> int:
    """Copy in a forked process that kills itself at its n-th ``fsync``; return its exit code."""
    if (child := os.fork()) == 0:
        syncs = iter(range(1, at_sync))
        fsync = os.fsync

        def dying_fsync(fd: int) -> None:
            if next(syncs, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(fd)

        os.fsync = dying_fsync
        copy(source, out)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("at_sync", range(1, 25))
def test_a_kill_leaves_no_output_and_the_next_run_writes_the_same_bytes(
    sharded: Path, tmp_path: Path, at_sync: int
) -> None:
    undisturbed = copy(sharded, tmp_path / "undisturbed")

    code = killed_copy(sharded, tmp_path / "out", at_sync)

    assert code in (0, -signal.SIGKILL)
    assert (tmp_path / "out").exists() == (tmp_path / "out" / MANIFEST).exists()
    assert copy(sharded, tmp_path / "out").manifest.contents == undisturbed.manifest.contents
    assert not list(tmp_path.glob("out.partial"))


def test_finished_shards_are_kept_unless_their_bytes_changed(sharded: Path, tmp_path: Path) -> None:
    source = open_checkpoint(sharded)
    first, second = (tmp_path / shard for shard in sorted(set(source.shards.values())))
    contents = writer.write_checkpoint(source, tmp_path, task="")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (first, second)}
    flip_bit(second, offset=-1)

    assert writer.write_checkpoint(source, tmp_path, task="") == contents
    assert first.stat().st_mtime_ns == before[first][0]
    assert second.read_bytes() == before[second][1]


def test_too_little_disk_space_is_refused_with_numbers_before_the_first_byte(sharded: Path, tmp_path: Path) -> None:
    vast = LazyTensor(spec=TensorSpec(dtype="F32", shape=(10**15,)), read=never)
    checkpoint = open_checkpoint(sharded).replace(tensors={"a.weight": vast})

    with pytest.raises(EnvironmentFault, match=r"4000000\.\d\d GB more, but its disk has \d+\.\d\d GB free"):
        writer.write_checkpoint(checkpoint, tmp_path, task="")
    assert not list(tmp_path.glob("*.safetensors*"))


def test_a_disk_that_fills_up_is_named_and_finished_tensors_are_kept(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real ENOSPC: ``/dev/full`` refuses every write."""
    pwrite = os.pwrite

    def write_to_full_disk(fd: int, data: memoryview, offset: int) -> int:
        is_second = "model-00002" in str(Path(f"/proc/self/fd/{fd}").readlink())
        with open("/dev/full", "wb", buffering=0) as full:  # noqa: PTH123
            return os.write(full.fileno(), data) if is_second else pwrite(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", write_to_full_disk)
        with pytest.raises(EnvironmentFault, match="is full"):
            copy(sharded, tmp_path / "out")

    assert any((tmp_path / "out.partial").glob("model-00001-of-00002.safetensors*"))
    assert not copy(sharded, tmp_path / "out").reused


@pytest.mark.lengthy
def test_memory_is_a_few_blocks_for_a_tensor_of_many(tmp_path: Path) -> None:
    """Writing a tensor of half a GiB adds less than 60 MB of resident memory."""
    command = [sys.executable, "-m", "qwen_pipeline_tests.checkpoint.write_large", str(tmp_path)]
    run = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert int(run.stdout) < 60e6


def never(start: int, stop: int) -> torch.Tensor:
    raise AssertionError(f"rows {start}:{stop} were read")
