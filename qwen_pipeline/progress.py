"""Progress of a stage: one event type, for the terminal and for Dagster's log."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Literal

Unit = Literal["bytes", "layers", "modules", "tokens", "windows", "answers", "seconds", "steps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """``done`` of ``total`` units of one task, with an optional remark for a log.

    ``unit="bytes"`` counts bytes moved; every other unit counts things.
    """

    task: str
    done: int
    total: int
    unit: Unit = "steps"
    remark: str = ""


Observe = Callable[[Progress], None]


def unobserved(_: Progress) -> None:
    """Ignore progress."""


class Meter:
    """Counts the bytes of one task, from any thread; :meth:`report` calls the observer on the calling thread."""

    def __init__(self, task: str, total: int, observe: Observe, *, done: int = 0) -> None:
        self._task, self._total, self._observe = task, total, observe
        self._done = done
        self._lock = Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count

    def report(self) -> None:
        self._observe(Progress(task=self._task, done=self._done, total=self._total, unit="bytes"))


def format_amount(progress: Progress) -> str:
    """Return the amount done, such as ``3 of 30 layers`` or ``0.21 of 1.02 GB``."""
    if progress.unit == "bytes":
        scale, name = (1e9, "GB") if progress.total >= 1e9 else (1e6, "MB")
        return f"{progress.done / scale:.2f} of {progress.total / scale:.2f} {name}"
    return f"{progress.done} of {progress.total} {progress.unit}"


def describe(progress: Progress) -> str:
    """Return a line for a log, such as ``quantize: 3 of 30 layers, layers.2.mlp.down_proj loss 0.0012``."""
    return f"{progress.task}: {format_amount(progress)}" + (f", {progress.remark}" if progress.remark else "")


class TransferRate:
    """The transfer rate of each task since its first event; bytes that were done before do not count."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[float, int]] = {}

    def describe(self, progress: Progress) -> str:
        """Return the rate and remaining time, such as ``0.45 GB/s, 2:05 left``; empty for units other than bytes."""
        now = time.monotonic()
        started, first = self._first.setdefault(progress.task, (now, progress.done))
        moved, seconds = progress.done - first, now - started
        if progress.unit != "bytes" or moved <= 0 or seconds <= 0:
            return ""
        left = round((progress.total - progress.done) * seconds / moved)
        rest = f", {left // 60}:{left % 60:02} left" if left else ""
        return f"{moved / seconds / 1e9:.2f} GB/s{rest}"


def logging_observer(log: Callable[[str], None], *, seconds: float = 5.0) -> Observe:
    """Return an observer that logs each layer and the end of each task, and other events every ``seconds`` at most."""
    logged: dict[str, int] = {}
    last = -seconds
    rates = TransferRate()

    def observe(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        rate = rates.describe(progress)
        is_milestone = progress.unit == "layers" or progress.done == progress.total
        if (is_milestone and logged.get(progress.task) != progress.done) or now - last >= seconds:
            logged[progress.task], last = progress.done, now
            log(describe(progress) + (f", {rate}" if rate else ""))

    return observe
