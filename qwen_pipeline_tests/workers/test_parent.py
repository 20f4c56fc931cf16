"""A worker's result, progress and errors reach the caller; its output and its processes do not outlive it."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline.errors import AdapterRefused, EnvironmentFault, WorkerFailed
from qwen_pipeline.progress import Observe, Progress, unobserved
from qwen_pipeline.workers.parent import WorkerResult, run_worker, started_worker
from qwen_pipeline_tests import REPOSITORY
from qwen_pipeline_tests.workers.processes import wait_until_ended

pytestmark = pytest.mark.lengthy

PYTHON = Path(sys.executable)
ROOT = str(REPOSITORY)
TARGETS = "qwen_pipeline_tests.workers.targets"


def call(target: str, log: Path, spec: Mapping[str, Any] | None = None, observe: Observe = unobserved) -> WorkerResult:
    return run_worker(
        PYTHON,
        f"{TARGETS}:{target}",
        spec or {},
        log=log,
        env={"TOKEN": "given", "PYTHONPATH": ROOT},
        observe=observe,
    )


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "worker.log"


def test_spec_result_progress_and_environment_cross_the_boundary(log: Path, capfd: pytest.CaptureFixture[str]) -> None:
    events: list[Progress] = []

    result = call("echo", log, {"nested": [1, {"ü": None}]}, events.append)

    assert result.value["spec"] == {"nested": [1, {"ü": None}]}
    assert result.value["TOKEN"] == "given"
    assert result.value["pid"] != os.getpid()
    assert events == [Progress(task="echo", done=1, total=2, unit="layers", remark="half")]
    assert result.peak_memory_bytes > 10 * 2**20
    assert capfd.readouterr() == ("", ""), "the output of libraries goes to the log"
    assert "a library that prints" in log.read_text()
    assert "a library that complains" in log.read_text()


def test_an_error_keeps_its_class_and_its_remedy(log: Path) -> None:
    with pytest.raises(AdapterRefused, match="refused rank") as caught:
        call("refuse", log, {"what": "rank"})
    assert caught.value.remedy == "give another"


def test_a_crash_quotes_the_end_of_the_log(log: Path) -> None:
    with pytest.raises(WorkerFailed, match=r"(?s)exit code 1.*KeyError: \"the library's own trouble\"") as caught:
        call("crash", log)
    assert str(log) in caught.value.remedy


def test_sigkill_is_reported_as_exhausted_memory(log: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"killed by SIGKILL.*memory"):
        call("kill_itself", log)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("fill_memory", "Memory ran out"),
        ("fill_memory_of_torch", "Memory ran out: .*you tried to allocate 1099511627776 bytes"),
        ("fill_disk", "The disk is full"),
        ("lose_a_thread", "Memory ran out"),
    ],
)
def test_exhausted_memory_or_disk_is_named(log: Path, target: str, message: str) -> None:
    with pytest.raises(EnvironmentFault, match=message):
        call(target, log)


def test_a_worker_imports_while_it_waits_for_its_task(log: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "imported"
    os.mkfifo(pipe)
    env = {"PYTHONPATH": ROOT, "IMPORTED": str(pipe)}
    with started_worker(PYTHON, f"{TARGETS}:echo", packages=["qwen_pipeline_tests.workers.noisy"], env=env) as worker:
        assert pipe.read_text() == "imported"
        assert os.pread(worker.printed, 100, 0) == b"imported\n"
        result = worker.run({"at": "last"}, log=log)

    assert result.value["spec"] == {"at": "last"}
    assert 0 < result.early_seconds <= result.import_seconds
    assert log.read_text().startswith("imported\n")
    assert "a library that prints" in log.read_text()


def test_imports_after_the_task_was_sent_are_not_early(log: Path) -> None:
    result = call("echo", log)
    assert 0 <= result.early_seconds < result.import_seconds


def test_a_worker_that_is_given_no_task_ends_with_its_context() -> None:
    with (
        pytest.raises(AdapterRefused),
        started_worker(PYTHON, f"{TARGETS}:echo", env={"PYTHONPATH": ROOT}) as worker,
    ):
        raise AdapterRefused("the task is invalid", remedy="correct it")
    assert worker.process.returncode == -signal.SIGTERM
    wait_until_ended(worker.process.pid)


def test_a_missing_package_is_quoted_from_the_log(log: Path) -> None:
    with (
        started_worker(PYTHON, f"{TARGETS}:echo", packages=["no_such"], env={"PYTHONPATH": ROOT}) as worker,
        pytest.raises(WorkerFailed, match="No module named 'no_such'"),
    ):
        worker.run({}, log=log)
    assert "no_such" in log.read_text()


def test_a_worker_runs_exit_functions_but_not_the_interpreter_shutdown(log: Path, tmp_path: Path) -> None:
    call("leave_traces", log, {"exit": str(tmp_path / "exit"), "end": str(tmp_path / "end")})
    assert (tmp_path / "exit").exists()
    assert not (tmp_path / "end").exists()
    assert "printed at the end" in log.read_text()


@pytest.mark.parametrize("code", [0, 3])
def test_a_result_arrives_before_the_worker_has_ended(log: Path, tmp_path: Path, code: int) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with started_worker(PYTHON, f"{TARGETS}:end_slowly", env={"PYTHONPATH": ROOT}) as worker:
        assert worker.run_task({"pipe": str(pipe), "code": code}, log=log).value == {}
        assert worker.process.poll() is None
        pipe.write_bytes(b"")
        with pytest.raises(WorkerFailed, match="exit code 3 after its result") if code else nullcontext():
            worker.require_end(log=log)


def test_a_missing_interpreter_is_named(log: Path) -> None:
    with pytest.raises(EnvironmentFault, match="cannot be started"):
        run_worker(Path("/nowhere/python"), "a:b", {}, log=log)


def test_an_interrupt_ends_the_whole_group(log: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call("linger", log, {"pids": str(pids)}, interrupt)
    worker, grandchild = map(int, pids.read_text().split())
    wait_until_ended(worker)
    wait_until_ended(grandchild)


def test_the_whole_group_ends_with_a_killed_parent(log: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    os.mkfifo(pids)
    program = (
        "import sys; from pathlib import Path; from qwen_pipeline.workers.parent import run_worker\n"
        "run_worker(Path(sys.executable), 'qwen_pipeline_tests.workers.targets:linger',"
        " {'pids': sys.argv[1]}, log=Path(sys.argv[2]), env={'PYTHONPATH': '.'})"
    )
    with subprocess.Popen([sys.executable, "-c", program, pids, log], cwd=ROOT) as parent:
        worker, grandchild = map(int, pids.read_text().split())
        parent.send_signal(signal.SIGKILL)
    wait_until_ended(worker)
    wait_until_ended(grandchild)
