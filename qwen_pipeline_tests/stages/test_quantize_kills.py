"""SIGKILL while the layer loop quantizes: nobody sees half a checkpoint, nobody survives, the digest stays the same.

``KILLS`` in the environment says how many there are. ``python -m qwen_pipeline_tests.stages.test_quantize_kills SOURCE
TEXT``, run by the engine's own python, does the same to any model, with workers that are forked instead of started:
they do not import the engine again, which is most of a small model's time, and everything else of them is real.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from qwen_pipeline.checkpoint.manifest import open_manifest
from qwen_pipeline.checkpoint.store import Artifact, Directory, require_intact
from qwen_pipeline.engines.environment import EngineEnvironment, find_environment
from qwen_pipeline.engines.protocol import QuantSpec
from qwen_pipeline.progress import Observe, Progress, unobserved
from qwen_pipeline.stages.quantize import WORKSHOP, quantize
from qwen_pipeline.workers import child, parent
from qwen_pipeline_tests.chain import write_text
from qwen_pipeline_tests.tiny import tiny_qwen2

SPEC = QuantSpec(engine="layerwise", group_size=32, samples=4, seq_len=32, batch_size=4, threads=1, device="cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A checkpoint to quantize, again and again."""

    source: Path
    calibration: Path
    spec: QuantSpec
    engine: EngineEnvironment

    def do(self, out: Path, observe: Observe = unobserved) -> Artifact:
        return quantize(
            source=self.source,
            destination=Directory(out),
            calibration=self.calibration,
            spec=self.spec,
            engine=self.engine,
            observe=observe,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A run that may have been killed: the exit code, and the layers that it solved."""

    code: int
    layers: list[int]


def attempt(work: Work, out: Path, moment: random.Random, events: int) -> Attempt:
    """Quantize in a forked process; kill it, or its worker, some time after one of its first ``events`` events.

    Raises:
        AssertionError: Something of it survives, or it left half a checkpoint.
    """
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reading)
        code = 1
        try:
            work.do(out, lambda event: tell(writing, event))
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    layers: list[int] = []
    fatal, linger, victim = moment.randrange(events), moment.uniform(0, 0.1), moment.choice(("stage", "worker"))
    family: list[int] = []
    with os.fdopen(reading) as told:
        for number, line in enumerate(told):
            task, _, done = line.partition(" ")
            layers += [int(done)] if task == "quantize" else []
            if number == fatal:
                time.sleep(linger)
                family = descendants(child)
                os.kill(family[-1] if victim == "worker" and family else child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in family):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.01)
    if out.exists():
        require_intact(out)
    return Attempt(code=code, layers=layers)


def tell(writing: int, event: Progress) -> None:
    os.write(writing, f"{event.task.split()[0]} {event.done}\n".encode())


def descendants(pid: int) -> list[int]:
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return [*children, *(grandchild for child in children for grandchild in descendants(child))]


def survive(work: Work, root: Path, kills: int, seed: int = 20) -> Iterator[Attempt]:
    """Kill until there were ``kills`` deaths; whenever a run gets through, hold its digest against the undisturbed one.

    A run after a death begins at the layer after the last one that was on disk then.
    """
    events: list[Progress] = []
    expected = work.do(root / "undisturbed", events.append).manifest.content_digest
    moment, deaths, number = random.Random(seed), 0, 0
    while deaths < kills:
        out, number = root / f"attempt-{number}", number + 1
        while not out.exists():
            finished = len(list(root.glob(f"{out.name}.partial/{WORKSHOP}/packed/layer-*.json")))
            found = attempt(work, out, moment, len(events))
            assert not found.layers or min(found.layers) >= finished, "a finished layer was quantized again"
            deaths += not out.exists()
            yield found
        assert open_manifest(out).content_digest == expected
        require_intact(out)
        assert not (out / WORKSHOP).exists()


@pytest.mark.slow
def test_kills_change_nothing(tmp_path: Path) -> None:
    source = tiny_qwen2(tmp_path / "source", intermediate_size=128, num_hidden_layers=8)
    text = write_text(tmp_path / "calibration.jsonl", documents=24, stride=7)
    kills = int(os.environ.get("KILLS", "20"))
    work = Work(source=source, calibration=text, spec=SPEC, engine=find_environment("gptqmodel"))
    attempts = list(survive(work, tmp_path, kills))
    assert len({layer for found in attempts for layer in found.layers}) == 8


class Forked:
    """A worker as ``subprocess.Popen`` starts it, forked from this process, which has imported the engine."""

    def __init__(self, command: Sequence[str], **how: Any) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for number, source in ((0, reading), (1, how["stdout"].fileno()), (2, how["stderr"].fileno())):
                os.dup2(source, number)
            os.close(writing)
            os.environ.update(how["env"])
            sys.stdin = os.fdopen(0)
            code = 1
            try:
                child.main(command[-1])
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            finally:
                os._exit(code)
        os.close(reading)
        self.stdin = os.fdopen(writing, "wb")
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif deadline and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("worker", timeout or 0)
            else:
                time.sleep(0.005)
        return self.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--group-size", type=int, default=64)
    asked = parser.parse_args()
    spec = QuantSpec(
        engine="layerwise", group_size=asked.group_size, samples=4, seq_len=64, batch_size=4, threads=1, device="cpu"
    )
    import_module("gptqmodel")
    here = EngineEnvironment(name="gptqmodel", python=Path(sys.executable))
    forking = SimpleNamespace(Popen=Forked, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired)
    with patch.object(parent, "subprocess", forking), tempfile.TemporaryDirectory() as scratch:
        work = Work(source=asked.source, calibration=asked.text, spec=spec, engine=here)
        for number, found in enumerate(survive(work, Path(scratch), asked.kills, asked.seed)):
            layers = f"layers {min(found.layers)} to {max(found.layers)}" if found.layers else "no layer"
            print(f"{number}: exit {found.code}, {layers}", flush=True)
    print("every run that got through has the undisturbed digest")


if __name__ == "__main__":
    sys.exit(main())
