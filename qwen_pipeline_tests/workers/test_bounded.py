"""An object in a process of its own answers, or its limits end it; no process outlives its object or its caller."""

import os
import signal
import subprocess
import sys

import pytest

from qwen_pipeline.errors import InputRefused, WorkerFailed
from qwen_pipeline.workers import bounded
from qwen_pipeline.workers.bounded import BoundedObject, LimitExceeded, Limits
from qwen_pipeline_tests import REPOSITORY
from qwen_pipeline_tests.workers.processes import wait_until_ended

LIMITS = Limits(seconds=1, memory_bytes=500_000_000)
TARGET = "qwen_pipeline_tests.workers.bounded_targets:make"


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("QWEN_PIPELINE_KEY_PASSPHRASE", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")


def test_requests_are_answered_by_one_process_without_secrets() -> None:
    made, other = BoundedObject(TARGET, {"ü": 1}, LIMITS), BoundedObject(TARGET, {}, LIMITS)
    first, second = (made.call({"do": "echo", "n": n}, LIMITS) for n in (1, 2))
    assert first["request"]["spec"] == {"ü": 1}
    assert (first["request"]["n"], second["request"]["n"]) == (1, 2)
    assert first["pid"] == second["pid"] != os.getpid()
    assert other.call({"do": "echo"}, LIMITS)["pid"] != first["pid"]
    assert made.call({"do": "secret"}, LIMITS) == []
    made.close()
    wait_until_ended(first["pid"])


def test_errors_keep_their_class_and_leave_the_object_usable() -> None:
    with pytest.raises(InputRefused, match="the spec"):
        BoundedObject(TARGET, {"refuse": True}, LIMITS)
    made = BoundedObject(TARGET, {}, LIMITS)
    with pytest.raises(InputRefused, match="the request"):
        made.call({"do": "refuse"}, LIMITS)
    with pytest.raises(WorkerFailed, match="KeyError: 'a slip'"):
        made.call({"do": "fail"}, LIMITS)
    assert made.call({"do": "repeat", "times": 3}, LIMITS) == "aaa"


@pytest.mark.parametrize(
    ("do", "words"),
    [
        ("loop", "1 seconds of processor time"),
        ("grow", "0.5 GB of memory"),
        ("abort", "0.5 GB of memory"),
    ],
)
def test_a_limit_ends_the_process(do: str, words: str) -> None:
    made = BoundedObject(TARGET, {}, LIMITS)
    pid = made.call({"do": "echo"}, LIMITS)["pid"]
    with pytest.raises(LimitExceeded, match=words):
        made.call({"do": do}, LIMITS)
    wait_until_ended(pid)


def test_a_process_that_waits_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    made = BoundedObject(TARGET, {}, LIMITS)
    pid = made.call({"do": "echo"}, LIMITS)["pid"]
    monkeypatch.setattr(Limits, "wall_seconds", 0.2)
    with pytest.raises(LimitExceeded, match=r"0\.2 seconds"):
        made.call({"do": "wait"}, LIMITS)
    wait_until_ended(pid)


def test_an_answer_that_is_far_too_long_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "_MAX_ANSWER_BYTES", 1000)
    made = BoundedObject(TARGET, {}, LIMITS)
    with pytest.raises((LimitExceeded, WorkerFailed)):
        made.call({"do": "repeat", "times": 100_000}, LIMITS)


def test_output_without_end_is_cut() -> None:
    made = BoundedObject(TARGET, {}, LIMITS)
    with pytest.raises(WorkerFailed, match="File too large"):
        made.call({"do": "write"}, LIMITS)


def test_an_exit_is_named() -> None:
    made = BoundedObject(TARGET, {}, LIMITS)
    with pytest.raises(WorkerFailed, match="ended with exit code 3"):
        made.call({"do": "exit"}, LIMITS)


def test_a_server_that_was_killed_is_started_again() -> None:
    pid = BoundedObject(TARGET, {}, LIMITS).call({"do": "echo"}, LIMITS)["pid"]
    server = bounded._servers[TARGET.partition(":")[0]]  # pyright: ignore[reportPrivateUsage]
    server.process.kill()
    server.process.wait()
    assert BoundedObject(TARGET, {}, LIMITS).call({"do": "echo"}, LIMITS)["pid"] != pid


def test_a_missing_module_is_quoted() -> None:
    with pytest.raises(WorkerFailed, match="ModuleNotFoundError"):
        BoundedObject("qwen_pipeline_tests.nothing:make", {}, LIMITS)


def test_nothing_outlives_a_caller_that_is_killed() -> None:
    code = (
        "from qwen_pipeline_tests.workers.test_bounded import *; made = BoundedObject(TARGET, {}, LIMITS);"
        " print(made.call({'do': 'echo'}, LIMITS)['pid'], bounded._servers[TARGET.partition(':')[0]].process.pid,"
        " flush=True); made.call({'do': 'wait'}, LIMITS)"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert caller.stdout
    pids = list(map(int, caller.stdout.readline().split()))
    caller.send_signal(signal.SIGKILL)
    caller.communicate()
    for pid in pids:
        wait_until_ended(pid)
