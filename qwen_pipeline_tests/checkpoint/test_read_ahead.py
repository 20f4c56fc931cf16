"""What will be read is in the page cache before it is read, and no more than fits."""

import mmap
import os
import time
from pathlib import Path
from threading import Thread

import pytest

from qwen_pipeline.checkpoint import page_cache as module
from qwen_pipeline.checkpoint.measure import bytes_moved
from qwen_pipeline.checkpoint.page_cache import read_ahead
from qwen_pipeline.checkpoint.store import stage_input
from qwen_pipeline.checkpoint.store.stage_input import open_input
from qwen_pipeline_tests.checkpoint.cached import cached_pages

NBYTES = 2**20
pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="nobody can be asked here")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files that are on disk and not in the cache."""
    made = [tmp_path / "first", tmp_path / "second"]
    for path in made:
        with path.open("wb") as file:
            file.write(bytes(NBYTES))
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if cached_pages(path):
            pytest.skip("files of this file system are always in memory")
    return made


def wait_for(asking: Thread | None, path: Path) -> None:
    assert asking
    asking.join()
    deadline = time.monotonic() + 10
    while cached_pages(path) < NBYTES // mmap.PAGESIZE:
        assert time.monotonic() < deadline, f"{path} was not read"


def test_files_are_read_in_order_as_far_as_is_allowed(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", NBYTES + 1)
    before = bytes_moved()[0]
    wait_for(read_ahead(files), files[0])
    assert cached_pages(files[1]) <= 1
    assert bytes_moved()[0] - before < 2 * NBYTES


def test_nothing_is_asked_for_that_memory_has_no_room_for(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "most_cached_bytes", lambda: None)
    asking = read_ahead(files)
    assert asking
    asking.join()
    assert not any(cached_pages(path) for path in files)


def test_a_file_that_is_gone_is_no_fault_of_whoever_looks_ahead(files: list[Path]) -> None:
    wait_for(read_ahead([files[0].with_name("gone"), files[1]]), files[1])


def test_an_input_is_read_ahead_unless_the_work_may_be_done(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(stage_input, "read_ahead", asked.extend)
    for read_now in (False, True):
        open_input("base", sharded, read_now=read_now)
        assert asked == sorted(sharded.glob("*.safetensors"))
        asked.clear()
    open_input("base", sharded, read_now=True)
    assert not asked
