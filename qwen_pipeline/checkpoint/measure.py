"""Wall clock time, bytes read and written, and peak resident memory of a computation."""

import resource
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from qwen_pipeline.checkpoint.manifest import RunFigures, describe_environment


class Stopwatch:
    """Seconds spent in each part of a computation; those of a repeated part are added up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> float:
        """Add the seconds since the last lap to a part, and return them."""
        last, self._last = self._last, time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0) + self._last - last
        return self._last - last


class Figures(Protocol):
    """A function that returns the figures so far; ``worker_peak_bytes`` is the peak of a worker process."""

    def __call__(self, *, worker_peak_bytes: int = 0) -> RunFigures: ...


_active: list[Figures] = []
"""The measurements in progress, from the outermost to the innermost."""


@contextmanager
def measured() -> Generator[Figures, None, None]:
    """Measure the body; yield a function that returns the figures.

    The peak is the kernel's high-water mark, reset at the start where ``/proc/self/clear_refs`` allows it. A nested
    measurement does not reset it, and has the peak of the outer one.
    """
    started, clock, moved = datetime.now(UTC), time.perf_counter(), bytes_moved()
    if not _active:
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

    _active.append(figures)
    try:
        yield figures
    finally:
        _active.remove(figures)


def bytes_moved() -> tuple[int, int]:
    """Return the bytes that this process has read and written, from disk or cache; 0 if unknown."""
    with suppress(OSError):
        lines = Path("/proc/self/io").read_text().splitlines()
        counts = {name: int(count) for name, _, count in (line.partition(": ") for line in lines)}
        return counts["rchar"], counts["wchar"]
    return 0, 0


def resident_peak() -> int:
    """Return the highest resident memory of this process, in bytes, since its start or the last reset."""
    return _resident("VmHWM")


def _resident(field: str) -> int:
    """Return a field of ``/proc/self/status`` in bytes; without that file, the peak that ``getrusage`` reports."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
