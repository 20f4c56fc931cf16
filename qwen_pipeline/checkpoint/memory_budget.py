"""Disk, memory and open files: those that writing a checkpoint takes, from headers alone, and those available."""

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
"""The source's rows, the update and the sum in float32 (twice as wide), the result, and the padded result."""
LEAVES_PER_THREAD = 8
"""Partial leaves of tree hashes: two each for the read, the merged and the padded tensor, and two spare."""
FILES_PER_THREAD = 2
"""One to read from, one to write to."""
OTHER_FILES = 8
"""Journal, lock, headers, directories and a progress display."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceNeeds:
    """The resources that a stage needs in addition to those in use: bytes of disk and of memory, and open files.

    Memory is ``threads x (6 x max(8 MiB, the longest row) + 8 MiB)``. It does not depend on the model's depth.
    """

    disk_bytes: int
    memory_bytes: int
    open_files: int


def estimate_needs(*, disk_bytes: int, longest_row_bytes: int = 0, threads: int | None = None) -> ResourceNeeds:
    """Return the needs of writing ``disk_bytes`` with ``threads``, by default those of this machine."""
    threads = pool_size() if threads is None else threads
    return ResourceNeeds(
        disk_bytes=disk_bytes,
        memory_bytes=threads
        * (BLOCKS_PER_THREAD * max(BLOCK_BYTES, longest_row_bytes) + LEAVES_PER_THREAD * LEAF_BYTES),
        open_files=threads * FILES_PER_THREAD + OTHER_FILES,
    )


def needs_of(checkpoint: Checkpoint, *, disk_bytes: int | None = None) -> ResourceNeeds:
    """Return the needs of writing a checkpoint; ``disk_bytes`` is less than its size if a part is written already."""
    rows = (tensor.spec.row_bytes for tensor in checkpoint.tensors.values() if not tensor.stored)
    return estimate_needs(
        disk_bytes=checkpoint.nbytes if disk_bytes is None else disk_bytes, longest_row_bytes=max(rows, default=0)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AvailableResources:
    """The resources available to a stage: free bytes of disk and of memory, and open files; None if unlimited."""

    disk_bytes: int
    memory_bytes: int | None
    open_files: int | None


def available_at(out: Path) -> AvailableResources:
    """Return the resources available for writing into a directory, which need not exist."""
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())
    max_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return AvailableResources(
        disk_bytes=shutil.disk_usage(existing).free,
        memory_bytes=available_memory(),
        open_files=None if max_files == resource.RLIM_INFINITY else max_files,
    )


def require_resources(needs: ResourceNeeds, out: Path) -> None:
    """Check that this machine has the resources for writing into ``out``.

    Raises:
        EnvironmentFault: Disk space, memory or open files do not suffice; the message has the numbers.
    """
    for shortage in shortages(needs, available_at(out), out):
        raise shortage


def shortages(needs: ResourceNeeds, available: AvailableResources, out: Path) -> Iterator[EnvironmentFault]:
    """Yield an error for each resource that does not suffice for writing into ``out``."""
    if needs.disk_bytes > available.disk_bytes:
        yield EnvironmentFault(
            f"{out} needs {needs.disk_bytes / 1e9:.2f} GB more, "
            f"but its disk has {available.disk_bytes / 1e9:.2f} GB free.",
            remedy="Free disk space or choose another destination; finished tensors are kept and not written again.",
        )
    if available.memory_bytes is not None and needs.memory_bytes > available.memory_bytes:
        yield EnvironmentFault(
            f"Writing {out} takes {needs.memory_bytes / 1e6:.0f} MB of memory, "
            f"but only {available.memory_bytes / 1e6:.0f} MB are available.",
            remedy="Close other programs, or run on fewer cores (taskset): memory is proportional to their number.",
        )
    if available.open_files is not None and needs.open_files > available.open_files:
        yield EnvironmentFault(
            f"Writing {out} takes {needs.open_files} open files, but the limit is {available.open_files}.",
            remedy=f"Raise the limit: ulimit -n {needs.open_files}.",
        )


def available_memory() -> int | None:
    """Return the bytes that this process can still use without swapping, within its control groups' limits."""
    limits = [limit for limit in (_unused_memory(), control_group_memory()) if limit is not None]
    return min(limits, default=None)


def control_group_memory(
    *, membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Return the bytes left within the limits of this process's control groups (version 2); None without a limit.

    Page cache counts as free, since the kernel reclaims it. Every group up to the root may have a limit.
    """
    with suppress(OSError, StopIteration):
        path = next(line[3:] for line in membership.read_text().splitlines() if line.startswith("0::"))
        group = mount / path.strip("/")
        groups = [each for each in (group, *group.parents) if each.is_relative_to(mount)]
        return min((free for each in groups if (free := _free_memory(each)) is not None), default=None)
    return None


def _free_memory(group: Path) -> int | None:
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        lines = (group / "memory.stat").read_text().splitlines()
        cache = sum(int(line.split()[1]) for line in lines if line.startswith(("active_file ", "inactive_file ")))
        return int(limit) - int((group / "memory.current").read_text()) + cache
    except OSError:
        return None


def _unused_memory() -> int | None:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    return None
