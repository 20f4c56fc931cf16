"""A command as a process of its own, measured from outside: time, steps, memory, and bytes read and written.

This module does not import torch: a child's peak memory starts from its parent's.
"""

import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.machine import processor_seconds

SAMPLE_SECONDS, GPU_SAMPLE_SECONDS, NOTE_SECONDS = 0.1, 0.5, 5.0
"""Intervals at which memory of the host and of GPUs is sampled, and at which figures of a running command are noted."""
LINE = re.compile(r"(?P<task>[^:]+): (?P<done>[\d.]+) of (?P<total>[\d.]+) (?P<unit>\w+)")
"""A line of progress: see :func:`qwen_pipeline.progress.describe`."""


@dataclass(slots=True, kw_only=True)
class Step:
    """The time between lines of progress that belongs to one task.

    Attributes:
        first: Seconds from the start of the command to the task's first line; ``last`` likewise.
        until_first: Seconds between the line before it, of any task, and its first line.
        seconds: Seconds from its first line to its last, without those of other tasks in between.
        started_at, done: The amounts in the first line and in the last.
    """

    task: str
    unit: str
    total: float
    first: float
    last: float
    until_first: float
    started_at: float
    done: float
    seconds: float = 0.0


@dataclass(slots=True, kw_only=True)
class Figures:
    """Figures of a command, complete once ``exit_code`` is known.

    Attributes:
        seconds: Wall clock; ``processor_seconds`` those of the process and its children.
        read_bytes: Bytes from the disk; ``written_bytes`` to it. They include children that have ended.
        asked_bytes: Bytes that were read, from the disk or from its cache.
        peak_host_bytes: Highest sum of the resident memory of the process and its children, sampled.
        peak_gpu_bytes: Highest memory in use on a GPU as the driver counts it, sampled; None without a GPU.
        after_last: Seconds between the last line of progress and the end.
        cut: Whether the command was ended because the time was over.
    """

    seconds: float = 0.0
    processor_seconds: float = 0.0
    read_bytes: int = 0
    written_bytes: int = 0
    asked_bytes: int = 0
    peak_host_bytes: int = 0
    peak_gpu_bytes: int | None = None
    after_last: float = 0.0
    exit_code: int | None = None
    cut: bool = False
    steps: list[Step] = field(default_factory=list[Step])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def watch(
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    log: Path,
    until: float,
    note: Callable[[Figures], None],
) -> Figures:
    """Run a command and return its figures.

    Args:
        command: Program and arguments.
        cwd: Its working directory.
        env: Its environment.
        log: File for its output.
        until: Reading of ``time.monotonic`` at which it is ended.
        note: Receives the figures so far, every few seconds.
    """
    found, used, before = Figures(), processor_seconds(), _io(os.getpid())
    started = time.monotonic()
    child = subprocess.Popen(command, cwd=cwd, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert child.stdout
    over = threading.Event()
    threads = [
        threading.Thread(target=_follow, args=(child.stdout, log, started, found)),
        threading.Thread(target=_sample_gpus, args=(over, found)),
    ]
    for thread in threads:
        thread.start()
    noted = started
    try:
        while child.poll() is None:
            found.seconds = time.monotonic() - started
            _sample(child.pid, found)
            if time.monotonic() >= until and not found.cut:
                found.cut = True
                child.terminate()
            if time.monotonic() - noted >= NOTE_SECONDS:
                noted = time.monotonic()
                note(found)
            time.sleep(SAMPLE_SECONDS)
        found.seconds = time.monotonic() - started
    finally:
        child.kill()
        over.set()
        for thread in threads:
            thread.join()
    found.after_last = found.seconds - (max((step.last for step in found.steps), default=0.0))
    found.processor_seconds = processor_seconds() - used
    moved = {name: count - before.get(name, 0) for name, count in _io(os.getpid()).items()}  # of children that ended
    found.read_bytes, found.written_bytes = moved.get("read_bytes", 0), moved.get("write_bytes", 0)
    found.asked_bytes = moved.get("rchar", 0)
    found.exit_code = child.returncode
    return found


def _follow(output: IO[bytes], log: Path, started: float, found: Figures) -> None:
    """Copy the output into a log, each line with its time, and note the steps."""
    steps: dict[str, Step] = {}
    last = 0.0
    with log.open("w") as file:
        for line in output:
            now, text = time.monotonic() - started, line.decode(errors="replace")
            file.write(f"{now:8.2f} {text}")
            file.flush()
            if not (matched := LINE.match(text)):
                continue
            task, done = matched["task"], float(matched["done"])
            if task in steps:
                step = steps[task]
                step.seconds, step.last, step.done = step.seconds + now - last, now, done
            else:
                steps[task] = Step(
                    task=task,
                    unit=matched["unit"],
                    total=float(matched["total"]),
                    first=now,
                    last=now,
                    until_first=now - last,
                    started_at=done,
                    done=done,
                )
                found.steps.append(steps[task])
            last = now


def _sample(root: int, found: Figures) -> None:
    """Add up the resident memory of a process and its descendants."""
    parents: dict[int, int] = {}
    pages: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError, IndexError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                pages[int(entry.name)] = int((entry / "statm").read_text().split()[1])
    family = {root}
    while more := {process for process, parent in parents.items() if parent in family} - family:
        family |= more
    resident = sum(pages.get(process, 0) for process in family) * os.sysconf("SC_PAGE_SIZE")
    found.peak_host_bytes = max(found.peak_host_bytes, resident)


def _sample_gpus(over: threading.Event, found: Figures) -> None:
    if not (program := shutil.which("nvidia-smi")):
        return
    command = [program, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    while not over.wait(GPU_SAMPLE_SECONDS):
        used = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        amounts = [int(one) * 2**20 for one in used.split() if one.isdecimal()]
        found.peak_gpu_bytes = max([found.peak_gpu_bytes or 0, *amounts])


def _io(process: int) -> dict[str, int]:
    """Return the counters of a process and of its children that were waited for; none where the kernel has none."""
    with suppress(OSError):
        lines = Path(f"/proc/{process}/io").read_text().splitlines()
        return {name: int(count) for name, _, count in (line.partition(": ") for line in lines)}
    return {}
