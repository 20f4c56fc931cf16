"""A quantization that is killed again and again, in a process forked for each attempt."""

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

PATIENCE_SECONDS = 60
"""How long the last of a killed family may take to end: a GPU's memory is given back first."""
Victim = Literal["stage", "worker"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A checkpoint to quantize, again and again."""

    source: Path
    calibration: Path
    spec: QuantSpec
    engine: WorkerEnvironment

    def do(self, out: Path, writing: int) -> None:
        """Quantize into ``out``; write a line for each event."""
        quantize(
            source=self.source,
            destination=Directory(out),
            calibration=self.calibration,
            spec=self.spec,
            engine=self.engine,
            observe=partial(tell, writing),
        )


def tell(writing: int, event: Progress) -> None:
    os.write(writing, f"{event.task.split()[0]} {event.done}\n".encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """Whom to kill, and when: so many seconds after an event."""

    victim: Victim
    event: int
    linger: float

    @classmethod
    def drawn(cls, moment: random.Random, events: int) -> "Kill":
        return cls(
            victim=moment.choice(get_args(Victim)), event=moment.randrange(events), linger=moment.uniform(0, 0.1)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A run that may have been killed.

    Attributes:
        code: Its exit code.
        events: How many it told.
        finished: Layers that were on disk when it began.
        layers: Those that it solved, one entry for each linear layer.
        victim: Who was killed; nobody if it was through before.
        task: What it was doing then.
        digest: Of what it made, if it got through.
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
    """Quantize in a forked process, and kill it, or its worker.

    Raises:
        AssertionError: Something of it survives, or it left half a checkpoint.
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
    events, layers, family = 0, list[int](), list[int]()
    victim: Victim | None = None
    task: str | None = None
    with os.fdopen(reading) as told:
        for events, line in enumerate(told, start=1):
            doing, _, done = line.partition(" ")
            layers += [int(done)] if doing == "quantize" else []
            if kill and events == kill.event + 1:
                time.sleep(kill.linger)
                family, task = [stage, *descendants(stage)], doing
                victim = kill.victim if len(family) > 1 else "stage"
                os.kill(family[1] if victim == "worker" else stage, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(stage, 0)[1])
    require_ended(family)
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


def require_ended(family: Sequence[int]) -> None:
    """Wait for processes to end; one that has, and was not asked for its exit code yet, counts as ended."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while left := [pid for pid in family if runs(pid)]:
        assert time.monotonic() < deadline, f"orphans: {left}"
        time.sleep(0.01)


def runs(pid: int) -> bool:
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
    """Kill until there were ``kills`` deaths; whatever gets through has to be what the undisturbed run made.

    Each run is killed within a share ``within`` of the undisturbed run's events, if it takes that many. A run after a
    death begins at the layer after the last one that was on disk then. The last run is let through, as is
    the one that is under way at the moment ``until`` of the monotonic clock.
    """
    moment, deaths, out = random.Random(seed), 0, root / "run-0"
    events = ceil(within * undisturbed.events)
    for number in count():
        more = deaths < kills and time.monotonic() < until
        found = attempt(work, out, Kill.drawn(moment, events) if more else None)
        deaths += found.digest is None
        yield found
        assert found.digest or found.victim, "a run failed that nobody killed"
        assert not found.layers or min(found.layers) >= found.finished, "a finished layer was quantized again"
        if found.digest:
            assert found.digest == undisturbed.digest
            assert not (out / WORK_DIR).exists()
            if not more:
                return
            out = root / f"run-{number + 1}"
