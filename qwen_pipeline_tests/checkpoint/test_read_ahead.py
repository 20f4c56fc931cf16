"""Files are in the page cache before they are read, up to a limit."""

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
pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system has no posix_fadvise")


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


def wait_for(thread: Thread | None, path: Path) -> None:
    assert thread
    thread.join()
    deadline = time.monotonic() + 10
    while cached_pages(path) < NBYTES // mmap.PAGESIZE:
        assert time.monotonic() < deadline, f"{path} was not read"


def test_files_are_read_in_order_up_to_the_limit(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_READ_AHEAD_BYTES", NBYTES + 1)
    before = bytes_moved()[0]
    wait_for(read_ahead(files), files[0])
    assert cached_pages(files[1]) <= 1
    assert bytes_moved()[0] - before < 2 * NBYTES


def test_nothing_is_requested_without_known_memory(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "max_cached_bytes", lambda: None)
    thread = read_ahead(files)
    assert thread
    thread.join()
    assert not any(cached_pages(path) for path in files)


def test_a_missing_file_is_skipped(files: list[Path]) -> None:
    wait_for(read_ahead([files[0].with_name("gone"), files[1]]), files[1])


def test_an_input_is_read_ahead_unless_the_output_may_exist(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[Path] = []
    monkeypatch.setattr(stage_input, "read_ahead", requested.extend)
    for read_now in (False, True):
        open_input("base", sharded, read_now=read_now)
        assert requested == sorted(sharded.glob("*.safetensors"))
        requested.clear()
    open_input("base", sharded, read_now=True)
    assert not requested
