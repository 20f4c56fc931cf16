"""Work for which this machine lacks resources is refused before the first byte, with numbers."""

import resource
import shutil
from pathlib import Path

import pytest

from qwen_pipeline.checkpoint import memory_budget
from qwen_pipeline.checkpoint.buffers import BLOCK_BYTES
from qwen_pipeline.checkpoint.memory_budget import (
    AvailableResources,
    ResourceNeeds,
    available_at,
    control_group_memory,
    estimate_needs,
    require_resources,
    shortages,
)
from qwen_pipeline.checkpoint.thread_pool import pool_size
from qwen_pipeline.errors import EnvironmentFault

SMALL = ResourceNeeds(disk_bytes=1, memory_bytes=1, open_files=1)


def test_small_needs_are_accepted(tmp_path: Path) -> None:
    require_resources(SMALL, tmp_path)


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (
            ResourceNeeds(disk_bytes=10**18, memory_bytes=1, open_files=1),
            r"needs 1000000000\.00 GB more, but its disk has \d",
        ),
        (
            ResourceNeeds(disk_bytes=1, memory_bytes=10**15, open_files=1),
            r"takes 1000000000 MB of memory, but only \d+ MB are",
        ),
        (
            ResourceNeeds(disk_bytes=1, memory_bytes=1, open_files=10**9),
            r"takes 1000000000 open files, but the limit is \d+",
        ),
    ],
)
def test_insufficient_resources_are_refused_with_numbers(needs: ResourceNeeds, message: str, tmp_path: Path) -> None:
    if needs.open_files > 1 and resource.getrlimit(resource.RLIMIT_NOFILE)[0] == resource.RLIM_INFINITY:
        pytest.skip("this machine has no limit on open files")
    with pytest.raises(EnvironmentFault, match=message):
        require_resources(needs, tmp_path)


def test_every_shortage_is_reported_and_a_missing_limit_is_none(tmp_path: Path) -> None:
    needs = ResourceNeeds(disk_bytes=2, memory_bytes=2, open_files=2)
    one_of_each = AvailableResources(disk_bytes=1, memory_bytes=1, open_files=1)
    assert len(list(shortages(needs, one_of_each, tmp_path))) == 3
    assert not list(shortages(needs, AvailableResources(disk_bytes=2, memory_bytes=None, open_files=None), tmp_path))


def test_disk_space_is_that_of_the_nearest_existing_directory(tmp_path: Path) -> None:
    existing, absent = available_at(tmp_path), available_at(tmp_path / "not" / "there")
    assert existing.open_files == absent.open_files
    assert absent.disk_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


def test_memory_grows_with_threads_and_rows_but_not_with_the_model() -> None:
    assert (
        estimate_needs(disk_bytes=1).memory_bytes
        == estimate_needs(disk_bytes=10**12).memory_bytes
        == pool_size() * 56 * 2**20
    )
    assert estimate_needs(disk_bytes=1, longest_row_bytes=2 * BLOCK_BYTES).memory_bytes == pool_size() * 104 * 2**20


def test_memory_stays_below_a_gib_on_any_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(512)))
    assert estimate_needs(disk_bytes=10**12).memory_bytes <= 2**30


def groups(root: Path, limits: dict[str, tuple[str, int, int]]) -> dict[str, Path]:
    """Write the files of control groups as the kernel does: path -> limit, bytes in use, bytes of cache in them."""
    for path, (limit, current, cache) in limits.items():
        group = root / path
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{current}\n")
        (group / "memory.stat").write_text(f"anon 1\nactive_file {cache}\ninactive_file 0\nslab 9\n")
    (root / "membership").write_text("0::/job/step\n")
    return {"membership": root / "membership", "mount": root}


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({"job/step": ("max", 5, 0)}, None),
        ({"job/step": ("1000", 600, 0)}, 400),
        ({"job/step": ("1000", 600, 500)}, 900),
        ({"job": ("700", 600, 0), "job/step": ("1000", 600, 0)}, 100),
    ],
)
def test_the_smallest_limit_counts_and_cache_is_free(
    limits: dict[str, tuple[str, int, int]], left: int | None, tmp_path: Path
) -> None:
    assert control_group_memory(**groups(tmp_path, limits)) == left


def test_a_control_group_limits_the_available_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = groups(tmp_path, {"job/step": ("50000000", 40000000, 0)})
    monkeypatch.setattr(memory_budget, "control_group_memory", lambda: control_group_memory(**paths))
    with pytest.raises(EnvironmentFault, match="takes 11 MB of memory, but only 10 MB are available"):
        require_resources(ResourceNeeds(disk_bytes=1, memory_bytes=11 * 10**6, open_files=1), tmp_path)
