"""Work that this machine cannot finish is refused before the first byte, with the numbers."""

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

LITTLE = ResourceNeeds(disk_bytes=1, memory_bytes=1, open_files=1)


def test_little_is_admitted(tmp_path: Path) -> None:
    require_resources(LITTLE, tmp_path)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            ResourceNeeds(disk_bytes=10**18, memory_bytes=1, open_files=1),
            r"needs 1000000000\.00 GB more, its disk has \d",
        ),
        (ResourceNeeds(disk_bytes=1, memory_bytes=10**15, open_files=1), r"takes 1000000000 MB of memory, \d+ MB are"),
        (
            ResourceNeeds(disk_bytes=1, memory_bytes=1, open_files=10**9),
            r"takes 1000000000 open files, the limit is \d+",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_numbers(asked: ResourceNeeds, message: str, tmp_path: Path) -> None:
    if asked.open_files > 1 and resource.getrlimit(resource.RLIMIT_NOFILE)[0] == resource.RLIM_INFINITY:
        pytest.skip("this machine has no limit on open files")
    with pytest.raises(EnvironmentFault, match=message):
        require_resources(asked, tmp_path)


def test_everything_that_is_short_is_named_and_no_limit_is_never_short(tmp_path: Path) -> None:
    asked = ResourceNeeds(disk_bytes=2, memory_bytes=2, open_files=2)
    one_of_each = AvailableResources(disk_bytes=1, memory_bytes=1, open_files=1)
    assert len(list(shortages(asked, one_of_each, tmp_path))) == 3
    assert not list(shortages(asked, AvailableResources(disk_bytes=2, memory_bytes=None, open_files=None), tmp_path))


def test_room_is_that_of_the_disk_where_a_directory_would_be(tmp_path: Path) -> None:
    there, absent = available_at(tmp_path), available_at(tmp_path / "not" / "there")
    assert there.open_files == absent.open_files
    assert absent.disk_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


def test_memory_grows_with_threads_and_rows_but_not_with_the_model() -> None:
    assert (
        estimate_needs(disk_bytes=1).memory_bytes
        == estimate_needs(disk_bytes=10**12).memory_bytes
        == pool_size() * 56 * 2**20
    )
    assert estimate_needs(disk_bytes=1, longest_row_bytes=2 * BLOCK_BYTES).memory_bytes == pool_size() * 104 * 2**20


def test_memory_stays_below_a_gib_however_many_cores_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(512)))
    assert estimate_needs(disk_bytes=10**12).memory_bytes <= 2**30


def groups(root: Path, limits: dict[str, tuple[str, int, int]]) -> dict[str, Path]:
    """Lay out control groups as the kernel shows them: path -> limit, bytes in use, and how many of them are cache."""
    for path, (limit, current, cache) in limits.items():
        at = root / path
        at.mkdir(parents=True, exist_ok=True)
        (at / "memory.max").write_text(f"{limit}\n")
        (at / "memory.current").write_text(f"{current}\n")
        (at / "memory.stat").write_text(f"anon 1\nactive_file {cache}\ninactive_file 0\nslab 9\n")
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
def test_the_tightest_control_group_counts_and_cache_is_no_burden(
    limits: dict[str, tuple[str, int, int]], left: int | None, tmp_path: Path
) -> None:
    assert control_group_memory(**groups(tmp_path, limits)) == left


def test_a_control_group_refuses_what_the_machine_would_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = groups(tmp_path, {"job/step": ("50000000", 40000000, 0)})
    monkeypatch.setattr(memory_budget, "control_group_memory", lambda: control_group_memory(**places))
    with pytest.raises(EnvironmentFault, match="takes 11 MB of memory, 10 MB are available"):
        require_resources(ResourceNeeds(disk_bytes=1, memory_bytes=11 * 10**6, open_files=1), tmp_path)
