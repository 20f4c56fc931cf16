"""How a stage tells whoever watches how far it is: one event type for the terminal and for Dagster's log."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Literal

Unit = Literal["bytes", "layers", "modules", "tokens", "windows", "answers", "seconds", "steps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """``done`` of ``total`` units of one task, with an optional remark worth a line in a log.

    ``unit="bytes"`` counts bytes moved; every other unit counts things.
    """

    task: str
    done: int
    total: int
    unit: Unit = "steps"
    remark: str = ""


Observe = Callable[[Progress], None]


def unobserved(_: Progress) -> None:
    """Watch nothing."""


class Meter:
    """Counts bytes of one task, from any thread, and tells an observer from the one that asks it to."""

    def __init__(self, task: str, total: int, observe: Observe, *, done: int = 0) -> None:
        self._task, self._total, self._observe = task, total, observe
        self._done = done
        self._lock = Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count

    def report(self) -> None:
        self._observe(Progress(task=self._task, done=self._done, total=self._total, unit="bytes"))


def figures(progress: Progress) -> str:
    """How far, in words: ``3 of 30 layers``, ``0.21 of 1.02 GB``."""
    if progress.unit == "bytes":
        scale, name = (1e9, "GB") if progress.total >= 1e9 else (1e6, "MB")
        return f"{progress.done / scale:.2f} of {progress.total / scale:.2f} {name}"
    return f"{progress.done} of {progress.total} {progress.unit}"


def describe(progress: Progress) -> str:
    """One line for a log: ``quantize: 3 of 30 layers, layers.2.mlp.down_proj loss 0.0012``."""
    return f"{progress.task}: {figures(progress)}" + (f", {progress.remark}" if progress.remark else "")


class Pace:
    """How fast each task moves bytes, from when it was first heard of; what was there before does not count."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[float, int]] = {}

    def of(self, progress: Progress) -> str:
        """Return the rate and the time that is left, such as ``0.45 GB/s, 2:05 left``; nothing for other units."""
        now = time.monotonic()
        began, at = self._first.setdefault(progress.task, (now, progress.done))
        moved, seconds = progress.done - at, now - began
        if progress.unit != "bytes" or moved <= 0 or seconds <= 0:
            return ""
        left = round((progress.total - progress.done) * seconds / moved)
        rest = f", {left // 60}:{left % 60:02} left" if left else ""
        return f"{moved / seconds / 1e9:.2f} GB/s{rest}"


def as_lines(say: Callable[[str], None], *, seconds: float = 5.0) -> Observe:
    """Say each layer once, the end always, and everything between at most every ``seconds``."""
    said: dict[str, int] = {}
    last = -seconds
    pace = Pace()

    def observe(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        rate = pace.of(progress)
        is_news = progress.unit == "layers" or progress.done == progress.total
        if (is_news and said.get(progress.task) != progress.done) or now - last >= seconds:
            said[progress.task], last = progress.done, now
            say(describe(progress) + (f", {rate}" if rate else ""))

    return observe
