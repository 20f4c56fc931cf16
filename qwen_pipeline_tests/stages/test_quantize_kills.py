"""SIGKILL while the layer loop quantizes: nobody sees half a checkpoint, nobody survives, the digest stays the same.

``KILLS`` in the environment says how many there are. ``python -m qwen_pipeline_tests.stages.test_quantize_kills SOURCE
TEXT``, run by the engine's own python, does the same to any model on a CPU or a GPU, and writes an account after each
attempt. Its workers are forked instead of started, unless ``--spawn`` is given: they do not import the engine again,
which is most of a small model's time, and everything else of them is real. Several can run side by side.
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
from qwen_pipeline_tests.stages.kills import Attempt, Victim, Work, attempt, survive

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
def test_kills_change_nothing(source: Path, text: Path, tmp_path: Path) -> None:
    work = Work(source=source, calibration=text, spec=SPEC, engine=find_environment("gptqmodel"))
    undisturbed = attempt(work, tmp_path / "undisturbed")
    attempts = list(survive(work, tmp_path, undisturbed, kills=int(os.environ.get("KILLS", "20"))))
    assert len({layer for found in attempts for layer in found.layers}) == 8
    assert {found.victim for found in attempts if not found.digest} == set(get_args(Victim))


@pytest.mark.slow
def test_workers_may_be_forked_and_an_account_is_given(source: Path, text: Path, tmp_path: Path) -> None:
    out, sizes = tmp_path / "account.json", ["--group-size", "32", "--seq-len", "32", "--device", "cpu"]
    subprocess.run(
        [find_environment("gptqmodel").python, "-m", __name__, source, text, "--kills", "4", "--out", out, *sizes],
        cwd=REPOSITORY, check=True, timeout=300,
    )  # fmt: skip
    told = json.loads(out.read_text())
    assert told["kills"] == 4
    assert told["same_digest"]
    assert told["runs_through"] >= 1


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


def account(spec: QuantSpec, undisturbed: Attempt, attempts: Sequence[Attempt]) -> Mapping[str, Any]:
    """Return what is known after the last attempt."""
    killed = [at for at in attempts if not at.digest]
    return {
        "spec": spec.to_json(),
        "undisturbed": {"seconds": undisturbed.seconds, "digest": undisturbed.digest},
        "kills": len(killed),
        "victims": Counter(at.victim for at in killed),
        "tasks": Counter(at.task for at in killed),
        "runs_through": len(attempts) - len(killed),
        "same_digest": all(at.digest == undisturbed.digest for at in attempts if at.digest),
        "resumed": sum(at.finished > 0 for at in attempts),
        "layers_taken_up": sum(at.finished for at in attempts),
        "layers_quantized": sum(len(set(at.layers)) for at in attempts),
        "seconds": round(sum(at.seconds for at in attempts), 1),
        "attempts": [{**asdict(at), "layers": sorted(set(at.layers))} for at in attempts],
    }


@contextmanager
def forking() -> Generator[None]:
    """Have workers forked from this process."""
    import_module("gptqmodel")
    popen = SimpleNamespace(Popen=Forked, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired)
    with patch.object(parent, "subprocess", popen):
        yield


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=inf, help="kill no more after that; the run at hand ends")
    parser.add_argument("--seed", type=int, default=20, help="of the kills")
    parser.add_argument("--within", type=float, default=1.0, help="share of a run's events that a kill may wait for")
    parser.add_argument("--spawn", action="store_true", help="start workers instead of forking them")
    parser.add_argument("--device", choices=get_args(Device), default=default_device())
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=64, help="tokens in each")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where each has a directory")
    parser.add_argument("--out", type=Path, default=Path("quantize-kills.json"), help="the account")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    until = time.monotonic() + 60 * asked.minutes
    asked.scratch.mkdir(parents=True, exist_ok=True)
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to look for a GPU must not initialise it: children are forked
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(asked.scratch / "compiled-kernels"))
    torch.set_num_threads(1)  # a fork would lose the others
    chosen = {name: getattr(asked, name) for name in ("group_size", "samples", "seq_len", "batch_size", "device")}
    spec = QuantSpec(engine="layerwise", threads=1, **chosen)
    here = WorkerEnvironment(name="gptqmodel", python=Path(sys.executable))
    work = Work(source=asked.source, calibration=asked.text, spec=spec, engine=here)
    with tempfile.TemporaryDirectory(dir=asked.scratch, prefix="kills-") as scratch:
        root = Path(scratch)
        with nullcontext() if asked.spawn else forking():
            undisturbed = attempt(work, root / "undisturbed")
            assert undisturbed.digest, "the undisturbed run failed; if for the GPU's sake, try --spawn"
            print(f"undisturbed: {undisturbed.seconds} s, {undisturbed.digest}", flush=True)
            attempts: list[Attempt] = []
            drawn = {"kills": asked.kills, "seed": asked.seed, "within": asked.within, "until": until}
            for found in survive(work, root, undisturbed, **drawn):
                attempts.append(found)
                told = account(spec, undisturbed, attempts)
                write_bytes(asked.out, json.dumps(told, indent=1).encode() + b"\n")
                what = f"killed {found.victim} during {found.task}" if found.victim else "let through"
                print(f"{told['kills']} kills: {what}, {found.finished} layers taken up, {found.seconds} s", flush=True)
    print("every run that got through has the undisturbed digest")


if __name__ == "__main__":
    main()
