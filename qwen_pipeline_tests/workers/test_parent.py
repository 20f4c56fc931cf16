"""A worker's result, progress and faults reach the caller; its noise and its processes do not outlive it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline.errors import AdapterRefused, EngineFault, EnvironmentFault
from qwen_pipeline.progress import Observe, Progress, unobserved
from qwen_pipeline.workers.parent import WorkerResult, run_worker, started_worker
from qwen_pipeline_tests import REPOSITORY

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
    seen: list[Progress] = []

    result = call("echo", log, {"nested": [1, {"ü": None}]}, seen.append)

    assert result.value["spec"] == {"nested": [1, {"ü": None}]}
    assert result.value["TOKEN"] == "given"
    assert result.value["pid"] != os.getpid()
    assert seen == [Progress(task="echo", done=1, total=2, unit="layers", remark="half")]
    assert result.peak_memory_bytes > 10 * 2**20
    assert capfd.readouterr() == ("", ""), "what libraries print belongs to the log"
    assert "a library that prints" in log.read_text()
    assert "a library that complains" in log.read_text()


def test_a_fault_keeps_its_class_and_its_remedy(log: Path) -> None:
    with pytest.raises(AdapterRefused, match="refused rank") as caught:
        call("refuse", log, {"what": "rank"})
    assert caught.value.remedy == "give another"


def test_a_crash_quotes_the_end_of_the_log(log: Path) -> None:
    with pytest.raises(EngineFault, match=r"(?s)exit code 1.*KeyError: \"the library's own trouble\"") as caught:
        call("crash", log)
    assert str(log) in caught.value.remedy


def test_sigkill_is_named_as_the_end_of_memory(log: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"killed by SIGKILL.*memory"):
        call("kill_itself", log)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("fill_memory", "Memory ran out"),
        ("fill_memory_of_torch", "Memory ran out: .*you tried to allocate 1099511627776 bytes"),
        ("fill_disk", "The disk is full"),
        ("lose_a_thread", "Memory ran out"),
    ],
)
def test_a_machine_at_its_end_is_named(log: Path, target: str, words: str) -> None:
    with pytest.raises(EnvironmentFault, match=words):
        call(target, log)


def test_a_worker_imports_while_it_waits_for_its_task(log: Path) -> None:
    with started_worker(
        PYTHON, f"{TARGETS}:echo", packages=["qwen_pipeline_tests.workers.noisy"], env={"PYTHONPATH": ROOT}
    ) as worker:
        wait_until(lambda: os.pread(worker.printed, 100, 0) == b"imported\n")
        result = worker.run({"at": "last"}, log=log)

    assert result.value["spec"] == {"at": "last"}
    assert 0 < result.early_seconds <= result.import_seconds
    assert log.read_text().startswith("imported\n")
    assert "a library that prints" in log.read_text()


def test_what_is_imported_after_the_task_came_is_not_early(log: Path) -> None:
    result = call("echo", log)
    assert 0 <= result.early_seconds < result.import_seconds


def test_a_worker_that_is_given_no_task_ends_with_its_context() -> None:
    with (
        pytest.raises(AdapterRefused),
        started_worker(PYTHON, f"{TARGETS}:echo", env={"PYTHONPATH": ROOT}) as worker,
    ):
        raise AdapterRefused("the task is no good", remedy="mend it")
    assert worker.process.returncode == -signal.SIGTERM
    wait_until_gone(worker.process.pid)


def test_an_absent_package_is_quoted_from_the_log(log: Path) -> None:
    with (
        started_worker(PYTHON, f"{TARGETS}:echo", packages=["no_such"], env={"PYTHONPATH": ROOT}) as worker,
        pytest.raises(EngineFault, match="No module named 'no_such'"),
    ):
        worker.run({}, log=log)
    assert "no_such" in log.read_text()


def test_a_worker_cleans_up_but_does_not_take_its_interpreter_apart(log: Path, tmp_path: Path) -> None:
    call("leave_traces", log, {"exit": str(tmp_path / "exit"), "end": str(tmp_path / "end")})
    assert (tmp_path / "exit").exists()
    assert not (tmp_path / "end").exists()
    assert "said at the very end" in log.read_text()


@pytest.mark.parametrize("code", [0, 3])
def test_a_result_is_there_before_the_worker_has_ended(log: Path, tmp_path: Path, code: int) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with started_worker(PYTHON, f"{TARGETS}:end_slowly", env={"PYTHONPATH": ROOT}) as worker:
        assert worker.deliver({"pipe": str(pipe), "code": code}, log=log).value == {}
        assert worker.process.poll() is None
        pipe.write_bytes(b"")
        with pytest.raises(EngineFault, match="exit code 3 after its result") if code else nullcontext():
            worker.require_end(log=log)


def test_an_absent_interpreter_is_named(log: Path) -> None:
    with pytest.raises(EnvironmentFault, match="cannot be started"):
        run_worker(Path("/nowhere/python"), "a:b", {}, log=log)


def test_an_interrupt_ends_the_whole_group(log: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call("linger", log, {"pids": str(pids)}, interrupt)
    worker, grandchild = map(int, pids.read_text().split())
    wait_until_gone(worker)
    wait_until_gone(grandchild)


def test_a_killed_parent_takes_the_whole_group_along(log: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    program = (
        "import sys; from pathlib import Path; from qwen_pipeline.workers.parent import run_worker\n"
        "run_worker(Path(sys.executable), 'qwen_pipeline_tests.workers.targets:linger',"
        " {'pids': sys.argv[1]}, log=Path(sys.argv[2]), env={'PYTHONPATH': '.'})"
    )
    with subprocess.Popen([sys.executable, "-c", program, pids, log], cwd=ROOT) as parent:
        wait_until(lambda: pids.is_file() and len(pids.read_text().split()) == 2)
        parent.send_signal(signal.SIGKILL)
    worker, grandchild = map(int, pids.read_text().split())
    wait_until_gone(worker)
    wait_until_gone(grandchild)


def wait_until_gone(pid: int) -> None:
    wait_until(lambda: not is_running(pid))


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
