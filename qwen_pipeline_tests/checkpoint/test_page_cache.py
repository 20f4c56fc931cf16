"""A write past the page cache is complete, and leaves no pages where the kernel supports that."""

import errno
import os
from pathlib import Path

import pytest

from qwen_pipeline.checkpoint import page_cache
from qwen_pipeline.checkpoint.page_cache import exceeds_page_cache, write_uncached
from qwen_pipeline_tests.checkpoint.cached import cached_pages

DATA = os.urandom(2**20 + 1)


def written(path: Path) -> Path:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 24 + len(DATA))
    assert write_uncached(fd, memoryview(DATA), 24) == len(DATA)
    os.fsync(fd)
    os.close(fd)
    return path


@pytest.mark.parametrize("refusal", [None, OSError(errno.EOPNOTSUPP, ""), OSError(errno.EINVAL, ""), AttributeError()])
def test_every_byte_is_written_whatever_the_kernel_supports(
    tmp_path: Path, refusal: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        assert refusal
        raise refusal

    if refusal:
        monkeypatch.setattr(os, "pwritev", refuse)
    assert written(tmp_path / "file").read_bytes() == bytes(24) + DATA


def test_a_full_disk_is_not_mistaken_for_an_old_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwritev", fail)
    with pytest.raises(OSError, match="full"):
        written(tmp_path / "file")


def test_bytes_on_disk_are_not_in_the_cache(tmp_path: Path) -> None:
    with (tmp_path / "probe").open("wb") as probe:
        try:
            os.pwritev(probe.fileno(), [DATA], 0, page_cache.RWF_DONTCACHE)
        except (OSError, AttributeError, NotImplementedError) as error:
            pytest.skip(f"{tmp_path} cannot be written past the cache here ({error})")
    assert cached_pages(written(tmp_path / "file")) <= 1


def test_a_quarter_of_the_available_memory_is_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for memory, outgrown in ((4 * 10**9, True), (4 * 10**9 + 8, False), (None, False)):
        monkeypatch.setattr(page_cache, "available_memory", lambda left=memory: left)
        assert exceeds_page_cache(10**9 + 1) == outgrown
