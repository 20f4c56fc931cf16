"""Wall clock time and peak resident memory of a piece of work."""

import resource
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from qwen_pipeline.checkpoint.manifest import RunFigures, describe_environment


class Stopwatch:
    """Seconds of a piece of work, part by part; those of a part that comes again are added up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> float:
        """Count what passed since the last lap as a part of the work; return it."""
        last, self._last = self._last, time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0) + self._last - last
        return self._last - last


class Figures(Protocol):
    def __call__(self, *, worker_peak_bytes: int = 0) -> RunFigures: ...


_measuring: list[Figures] = []
"""What is being measured, from the outside in."""


@contextmanager
def measured() -> Generator[Figures, None, None]:
    """Measure the body; call what is yielded after it to get the figures.

    The peak is the kernel's high-water mark, reset at the start where ``/proc/self/clear_refs`` allows it. Work within
    measured work does not reset it: its peak is that of the whole.
    """
    started, clock, moved = datetime.now(UTC), time.perf_counter(), bytes_moved()
    if not _measuring:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    at_start = _resident("VmRSS")

    def figures(*, worker_peak_bytes: int = 0) -> RunFigures:
        peak = resident_peak()
        read, written = (now - before for now, before in zip(bytes_moved(), moved, strict=True))
        return RunFigures(
            seconds=round(time.perf_counter() - clock, 3),
            peak_memory_bytes=max(peak, worker_peak_bytes),
            added_memory_bytes=max(peak - at_start, worker_peak_bytes),
            read_bytes=read,
            written_bytes=written,
            started=started.isoformat(timespec="seconds"),
            environment=describe_environment(),
        )

    _measuring.append(figures)
    try:
        yield figures
    finally:
        _measuring.remove(figures)


def bytes_moved() -> tuple[int, int]:
    """Return how many bytes this process has read and written, whether or not a disk had to move; 0 if unknown."""
    with suppress(OSError):
        lines = Path("/proc/self/io").read_text().splitlines()
        counts = {name: int(count) for name, _, count in (line.partition(": ") for line in lines)}
        return counts["rchar"], counts["wchar"]
    return 0, 0


def resident_peak() -> int:
    """Highest resident memory of this process, in bytes, since the start or the last reset."""
    return _resident("VmHWM")


def _resident(field: str) -> int:
    """Return a figure of ``/proc/self/status`` in bytes; where there is none, the highest that the system kept."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
