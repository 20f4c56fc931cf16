"""SIGKILL while the layer loop quantizes: no incomplete checkpoint is visible, no process survives, digests are equal.

The environment variable ``KILLS`` sets the number of kills.
``python -m qwen_pipeline_tests.stages.quantize.test_kills SOURCE TEXT``, run by the python of the quantizer's
environment, does the same with any model on a CPU or a GPU, and writes a summary after each attempt. Its workers are
forked instead of started, unless ``--spawn`` is given: they do not import the quantizer again, which takes most of the
time with a small model, and are otherwise unchanged. Several such programs can run at the same time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from importlib import import_module
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import patch

import pytest
import torch

from qwen_pipeline.checkpoint.files import write_bytes
from qwen_pipeline.quantization.spec import Device, QuantSpec, default_device
from qwen_pipeline.workers import child, parent
from qwen_pipeline.workers.environments import WorkerEnvironment, find_environment
from qwen_pipeline_tests import REPOSITORY
from qwen_pipeline_tests.stages.quantize.kills import Attempt, Victim, Work, attempt, survive

SPEC = QuantSpec(engine="layerwise", group_size=32, samples=4, seq_len=32, batch_size=4, threads=1, device="cpu")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    from qwen_pipeline_tests.tiny import tiny_qwen2

    return tiny_qwen2(tmp_path / "source", intermediate_size=128, num_hidden_layers=8)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    from qwen_pipeline_tests.chain import write_text

    return write_text(tmp_path / "calibration.jsonl", documents=24, stride=7)


@pytest.mark.slow
def test_kills_do_not_change_the_digest(source: Path, text: Path, tmp_path: Path) -> None:
    work = Work(source=source, calibration=text, spec=SPEC, engine=find_environment("gptqmodel"))
    undisturbed = attempt(work, tmp_path / "undisturbed")
    attempts = list(survive(work, tmp_path, undisturbed, kills=int(os.environ.get("KILLS", "10"))))
    assert len({layer for found in attempts for layer in found.layers}) == 8
    assert {found.victim for found in attempts if not found.digest} == set(get_args(Victim))


@pytest.mark.slow
def test_workers_can_be_forked_and_a_summary_is_written(source: Path, text: Path, tmp_path: Path) -> None:
    out, sizes = tmp_path / "summary.json", ["--group-size", "32", "--seq-len", "32", "--device", "cpu"]
    subprocess.run(
        [find_environment("gptqmodel").python, "-m", __name__, source, text, "--kills", "4", "--out", out, *sizes],
        cwd=REPOSITORY, check=True, timeout=300,
    )  # fmt: skip
    summary = json.loads(out.read_text())
    assert summary["kills"] == 4
    assert summary["same_digest"]
    assert summary["runs_through"] >= 1


class Forked:
    """A worker like those of ``subprocess.Popen``, forked from this process, which has imported the quantizer."""

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
                child.main(*command[command.index("-c") + 2 :])
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(reading)
        self.stdin = os.fdopen(writing, "wb")
        self.returncode: int | None = None

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        self.stdin.close()
        self.wait()

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


def summarize(spec: QuantSpec, undisturbed: Attempt, attempts: Sequence[Attempt]) -> Mapping[str, Any]:
    """Summarize the attempts."""
    killed = [each for each in attempts if not each.digest]
    return {
        "spec": spec.to_json(),
        "undisturbed": {"seconds": undisturbed.seconds, "digest": undisturbed.digest},
        "kills": len(killed),
        "victims": Counter(each.victim for each in killed),
        "tasks": Counter(each.task for each in killed),
        "runs_through": len(attempts) - len(killed),
        "same_digest": all(each.digest == undisturbed.digest for each in attempts if each.digest),
        "resumed": sum(each.finished > 0 for each in attempts),
        "layers_taken_up": sum(each.finished for each in attempts),
        "layers_quantized": sum(len(set(each.layers)) for each in attempts),
        "seconds": round(sum(each.seconds for each in attempts), 1),
        "attempts": [{**asdict(each), "layers": sorted(set(each.layers))} for each in attempts],
    }


@contextmanager
def forking() -> Generator[None]:
    """Fork workers from this process."""
    import_module("gptqmodel")
    popen = SimpleNamespace(Popen=Forked, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired)
    with patch.object(parent, "subprocess", popen):
        yield


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=inf, help="time after which no run is killed")
    parser.add_argument("--seed", type=int, default=20, help="seed of the kills")
    parser.add_argument("--within", type=float, default=1.0, help="latest kill, as a share of a run's events")
    parser.add_argument("--spawn", action="store_true", help="start workers instead of forking them")
    parser.add_argument("--device", choices=get_args(Device), default=default_device())
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=64, help="tokens in each")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()), help="parent of a scratch directory"
    )
    parser.add_argument("--out", type=Path, default=Path("quantize-kills.json"), help="file of the summary")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    until = time.monotonic() + 60 * options.minutes
    options.scratch.mkdir(parents=True, exist_ok=True)
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # looking for a GPU must not initialise CUDA before a fork
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(options.scratch / "compiled-kernels"))
    torch.set_num_threads(1)  # other threads would not survive a fork
    chosen = {name: getattr(options, name) for name in ("group_size", "samples", "seq_len", "batch_size", "device")}
    spec = QuantSpec(engine="layerwise", threads=1, **chosen)
    this_environment = WorkerEnvironment(name="gptqmodel", python=Path(sys.executable))
    work = Work(source=options.source, calibration=options.text, spec=spec, engine=this_environment)
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="kills-") as scratch:
        root = Path(scratch)
        with nullcontext() if options.spawn else forking():
            undisturbed = attempt(work, root / "undisturbed")
            assert undisturbed.digest, "the undisturbed run failed; if the GPU is the cause, try --spawn"
            print(f"undisturbed: {undisturbed.seconds} s, {undisturbed.digest}", flush=True)
            attempts: list[Attempt] = []
            drawn = {"kills": options.kills, "seed": options.seed, "within": options.within, "until": until}
            for found in survive(work, root, undisturbed, **drawn):
                attempts.append(found)
                summary = summarize(spec, undisturbed, attempts)
                write_bytes(options.out, json.dumps(summary, indent=1).encode() + b"\n")
                outcome = f"killed {found.victim} during {found.task}" if found.victim else "not killed"
                print(
                    f"{summary['kills']} kills: {outcome}, {found.finished} layers resumed, {found.seconds} s",
                    flush=True,
                )
    print("every run that completed has the digest of the undisturbed run")


if __name__ == "__main__":
    main()
