"""What writing a checkpoint will take, known from headers alone, and whether this machine has it."""

import resource
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qwen_pipeline.checkpoint.buffers import BLOCK_BYTES
from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.checkpoint.thread_pool import pool_size
from qwen_pipeline.checkpoint.tree_hash import LEAF_BYTES
from qwen_pipeline.errors import EnvironmentFault

BLOCKS_PER_THREAD = 6
"""A source's rows, the update and the sum in float32 (twice as wide), the result, and the padded result."""
LEAVES_PER_THREAD = 8
"""Parts of blocks of a digest: two for each of the three digests of what is read, merged and padded, and two spare."""
FILES_PER_THREAD = 2
"""One read from, one written to."""
FILES_BESIDE = 8
"""Journal, lock, headers, directories, a progress display."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceNeeds:
    """What a stage takes beyond what the process has: bytes of disk and of memory, and open files.

    Memory is ``threads x (6 x max(8 MiB, the longest row) + 8 MiB)``: it does not depend on the model's depth.
    """

    disk_bytes: int
    memory_bytes: int
    open_files: int


def estimate_needs(*, disk_bytes: int, longest_row_bytes: int = 0) -> ResourceNeeds:
    """Return what writing so many bytes takes on this machine's cores."""
    threads = pool_size()
    return ResourceNeeds(
        disk_bytes=disk_bytes,
        memory_bytes=threads
        * (BLOCKS_PER_THREAD * max(BLOCK_BYTES, longest_row_bytes) + LEAVES_PER_THREAD * LEAF_BYTES),
        open_files=threads * FILES_PER_THREAD + FILES_BESIDE,
    )


def needs_of(checkpoint: Checkpoint, *, disk_bytes: int | None = None) -> ResourceNeeds:
    """Return what writing a checkpoint takes; ``disk_bytes`` is less than its size if a part of it is there."""
    rows = (tensor.spec.row_bytes for tensor in checkpoint.tensors.values() if not tensor.stored)
    return estimate_needs(
        disk_bytes=checkpoint.nbytes if disk_bytes is None else disk_bytes, longest_row_bytes=max(rows, default=0)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AvailableResources:
    """What a machine has for a stage: free bytes of a disk and of memory, and open files; None: no limit is known."""

    disk_bytes: int
    memory_bytes: int | None
    open_files: int | None


def available_at(out: Path) -> AvailableResources:
    """Return what there is for writing into a directory, which need not be there yet."""
    there = next(at for at in (out.absolute(), *out.absolute().parents) if at.is_dir())
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return AvailableResources(
        disk_bytes=shutil.disk_usage(there).free,
        memory_bytes=available_memory(),
        open_files=None if files == resource.RLIM_INFINITY else files,
    )


def require_resources(asked: ResourceNeeds, out: Path) -> None:
    """Refuse work that this machine cannot finish.

    Raises:
        EnvironmentFault: There is less disk, memory or open files than it takes; the message has the numbers.
    """
    for shortage in shortages(asked, available_at(out), out):
        raise shortage


def shortages(asked: ResourceNeeds, room: AvailableResources, out: Path) -> Iterator[EnvironmentFault]:
    """Yield each thing that there is too little of for writing into ``out``."""
    if asked.disk_bytes > room.disk_bytes:
        yield EnvironmentFault(
            f"{out} needs {asked.disk_bytes / 1e9:.2f} GB more, its disk has {room.disk_bytes / 1e9:.2f} GB free.",
            remedy="Free disk space or choose another destination; what is finished is kept and not written again.",
        )
    if room.memory_bytes is not None and asked.memory_bytes > room.memory_bytes:
        yield EnvironmentFault(
            f"Writing {out} takes {asked.memory_bytes / 1e6:.0f} MB of memory, "
            f"{room.memory_bytes / 1e6:.0f} MB are available.",
            remedy="End other programs, or run with fewer cores (taskset): memory is proportional to them.",
        )
    if room.open_files is not None and asked.open_files > room.open_files:
        yield EnvironmentFault(
            f"Writing {out} takes {asked.open_files} open files, the limit is {room.open_files}.",
            remedy=f"Raise it: ulimit -n {asked.open_files}.",
        )


def available_memory() -> int | None:
    """Return the bytes that this process can have without swapping: what the kernel and its control groups leave."""
    left = [count for count in (_unused(), control_group_memory()) if count is not None]
    return min(left, default=None)


def control_group_memory(
    *, membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Return what the limits of this process's control groups (version 2) leave; None without a limit.

    Page cache counts as left: the kernel takes it back. Every group up to the root may have a limit.
    """
    with suppress(OSError, StopIteration):
        place = next(line[3:] for line in membership.read_text().splitlines() if line.startswith("0::"))
        group = mount / place.strip("/")
        groups = [at for at in (group, *group.parents) if at.is_relative_to(mount)]
        return min((left for at in groups if (left := _left_in(at)) is not None), default=None)
    return None


def _left_in(group: Path) -> int | None:
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        lines = (group / "memory.stat").read_text().splitlines()
        cache = sum(int(line.split()[1]) for line in lines if line.startswith(("active_file ", "inactive_file ")))
        return int(limit) - int((group / "memory.current").read_text()) + cache
    except OSError:
        return None


def _unused() -> int | None:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    return None
