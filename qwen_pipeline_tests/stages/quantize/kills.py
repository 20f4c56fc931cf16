"""Repeated kills of a quantization, in a process forked for each attempt."""

import os
import random
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import ceil, inf
from pathlib import Path
from typing import Literal, get_args

from qwen_pipeline.checkpoint.manifest import open_manifest
from qwen_pipeline.checkpoint.store.derive import WORK_DIR
from qwen_pipeline.checkpoint.store.destinations import Directory
from qwen_pipeline.checkpoint.store.verify import require_intact
from qwen_pipeline.progress import Progress
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline.workers.environments import WorkerEnvironment

END_SECONDS = 60
"""Longest time until all processes of a killed attempt have ended: memory of a GPU is released first."""
Victim = Literal["stage", "worker"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A quantization that is repeated."""

    source: Path
    calibration: Path
    spec: QuantSpec
    engine: WorkerEnvironment

    def do(self, out: Path, writing: int) -> None:
        """Quantize into ``out``; write a line for each event to a file descriptor."""
        quantize(
            source=self.source,
            destination=Directory(out),
            calibration=self.calibration,
            spec=self.spec,
            engine=self.engine,
            observe=partial(write_event, writing),
        )


def write_event(writing: int, event: Progress) -> None:
    os.write(writing, f"{event.task.split()[0]} {event.done}\n".encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """The process to kill, and the time: ``linger`` seconds after an event."""

    victim: Victim
    event: int
    linger: float

    @classmethod
    def drawn(cls, generator: random.Random, events: int) -> "Kill":
        return cls(
            victim=generator.choice(get_args(Victim)),
            event=generator.randrange(events),
            linger=generator.uniform(0, 0.1),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A run that may have been killed.

    Attributes:
        code: Its exit code.
        events: Number of events that it reported.
        finished: Layers that were on disk when it began.
        layers: Layers that it solved, one entry for each linear layer.
        victim: The process that was killed; None if the run completed before.
        task: Its task at that time.
        digest: Content digest of the output, if the run completed.
    """

    code: int
    seconds: float
    events: int
    finished: int
    layers: Sequence[int]
    victim: Victim | None
    task: str | None
    digest: str | None


def attempt(work: Work, out: Path, kill: Kill | None = None) -> Attempt:
    """Quantize in a forked process, and kill it or its worker.

    Raises:
        AssertionError: One of its processes survives, or it left an incomplete checkpoint.
    """
    began, finished = time.monotonic(), len(list(out.parent.glob(f"{out.name}.partial/{WORK_DIR}/packed/layer-*.json")))
    reading, writing = os.pipe()
    if (stage := os.fork()) == 0:
        os.close(reading)
        code = 1
        try:
            work.do(out, writing)
            code = 0
        except Exception:
            if kill is None:
                traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    events, layers, processes = 0, list[int](), list[int]()
    victim: Victim | None = None
    task: str | None = None
    with os.fdopen(reading) as lines:
        for events, line in enumerate(lines, start=1):
            current, _, done = line.partition(" ")
            layers += [int(done)] if current == "quantize" else []
            if kill and events == kill.event + 1:
                time.sleep(kill.linger)
                processes, task = [stage, *descendants(stage)], current
                victim = kill.victim if len(processes) > 1 else "stage"
                os.kill(processes[1] if victim == "worker" else stage, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(stage, 0)[1])
    require_ended(processes)
    if out.exists():
        require_intact(out)
    return Attempt(
        code=code,
        seconds=round(time.monotonic() - began, 2),
        events=events,
        finished=finished,
        layers=layers,
        victim=victim if code else None,
        task=task if code else None,
        digest=open_manifest(out).content_digest if out.exists() else None,
    )


def descendants(pid: int) -> list[int]:
    """Return a process's children, then theirs."""
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return [*children, *(grandchild for child in children for grandchild in descendants(child))]


def require_ended(processes: Sequence[int], *, seconds: float = END_SECONDS) -> None:
    """Wait for processes to end; a zombie counts as ended."""
    deadline = time.monotonic() + seconds
    while left := [pid for pid in processes if is_running(pid)]:
        assert time.monotonic() < deadline, f"orphans: {left}"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def survive(
    work: Work,
    root: Path,
    undisturbed: Attempt,
    *,
    kills: int,
    seed: int = 20,
    within: float = 1.0,
    until: float = inf,
) -> Iterator[Attempt]:
    """Yield attempts until ``kills`` of them were killed; each output must equal that of the undisturbed run.

    Each run is killed within a share ``within`` of the undisturbed run's events, unless it completes earlier. A run
    after a kill begins at the layer after the last one that was on disk. The last run is not killed; neither is the run
    that is in progress at the time ``until`` of the monotonic clock.
    """
    generator, deaths, out = random.Random(seed), 0, root / "run-0"
    events = ceil(within * undisturbed.events)
    for number in count():
        more = deaths < kills and time.monotonic() < until
        found = attempt(work, out, Kill.drawn(generator, events) if more else None)
        deaths += found.digest is None
        yield found
        assert found.digest or found.victim, "a run failed without being killed"
        assert not found.layers or min(found.layers) >= found.finished, "a finished layer was quantized again"
        if found.digest:
            assert found.digest == undisturbed.digest
            assert not (out / WORK_DIR).exists()
            if not more:
                return
            out = root / f"run-{number + 1}"
