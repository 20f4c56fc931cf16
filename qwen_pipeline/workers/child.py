"""The worker process, which imports the target, calls it with its task, and reports progress, the result or an error.

It runs under the Python of another environment, and ends when its parent ends.
"""

import ctypes
import errno
import importlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from qwen_pipeline.checkpoint.measure import resident_peak
from qwen_pipeline.errors import EnvironmentFault, PipelineError
from qwen_pipeline.progress import Observe, Progress
from qwen_pipeline.workers.fast_exit import fast_exit

WorkerFunction = Callable[[Mapping[str, Any], Observe], Mapping[str, Any]]

_MESSAGES_FD = "QWEN_PIPELINE_MESSAGES_FD"
_PR_SET_PDEATHSIG = 1
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")
"""Words in the messages of CUDA's libraries, and of the RuntimeError that torch raises for host memory."""


def main(target: str, *packages: str) -> None:
    """Import ``package.module:function`` and more packages, call it with the task from standard input, then exit."""
    with fast_exit():
        sys.exit(_call(target, packages))


def _call(target: str, packages: Sequence[str]) -> int:
    die_with_parent()
    _require_parent()
    _start_group_reaper()
    try:
        started = time.monotonic()
        function = _function(target)
        for package in packages:
            importlib.import_module(package)
        imported = time.monotonic()
        task = json.load(sys.stdin)
        _redirect_output(task["log"])
        value = function(task["spec"], _observe)
        task_sent = min(max(task["time"], started), imported)
        figures = {"import_seconds": imported - started, "early_seconds": task_sent - started}
        _send("result", {"value": value, "peak_memory_bytes": resident_peak(), **figures})
    except Exception as error:
        if fault := report(error):
            return fault.exit_code
        raise
    finally:
        os.close(int(os.environ.pop(_MESSAGES_FD)))
    return 0


def report(error: Exception) -> PipelineError | None:
    """Send the parent an error of this package or of the machine, and return it as a :class:`PipelineError`.

    Return None for any other error. Call it for errors that a target raises, and for those in threads of a library that
    ends the process after one.
    """
    fault = error if isinstance(error, PipelineError) else _machine_fault(error)
    if fault and _MESSAGES_FD in os.environ:
        _send("fault", {"kind": type(fault).__name__, "what": fault.what, "remedy": fault.remedy})
    return fault


def _observe(progress: Progress) -> None:
    _send("progress", asdict(progress))


def _send(kind: str, content: Mapping[str, Any]) -> None:
    """Write one message in one call, since several threads may write."""
    os.write(int(os.environ[_MESSAGES_FD]), json.dumps([kind, content]).encode() + b"\n")


def _function(target: str) -> WorkerFunction:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _redirect_output(log: str) -> None:
    """Redirect standard output and error to a log, and move the output so far into it."""
    printed, _ = os.pread(1, os.fstat(1).st_size, 0), os.ftruncate(1, 0)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.write(file, printed)
    for stream in (1, 2):
        os.dup2(file, stream)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies; on other systems than Linux do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _require_parent() -> None:
    """End this process if its parent has ended before :func:`die_with_parent` was called."""
    if sys.platform == "linux" and os.getppid() != int(os.environ["QWEN_PIPELINE_PARENT"]):
        sys.exit("The parent process has ended.")


def _start_group_reaper() -> None:
    """Fork a process outside of this one's group, which kills the rest of the group once this process has ended.

    The kernel's signal reaches this process alone; processes that a library started would survive it.
    """
    if sys.platform != "linux":
        return
    group, worker = os.getpgid(0), os.pidfd_open(os.getpid())
    if os.fork():
        os.close(worker)
        return
    os.setsid()
    os.closerange(0, worker)
    os.closerange(worker + 1, os.sysconf("SC_OPEN_MAX"))
    select.select([worker], [], [])
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    os._exit(0)


def _machine_fault(error: Exception) -> EnvironmentFault | None:
    """Return an error for exhausted memory (of host or GPU) or disk space, which libraries raise as several classes."""
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or getattr(error, "errno", None) == errno.ENOMEM
        or any(words in str(error) for words in _OUT_OF_MEMORY)
    ):
        return EnvironmentFault(
            f"Memory ran out: {error}", remedy="Lower the batch size or the number of samples, or use a larger machine."
        )
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
        return EnvironmentFault(f"The disk is full: {error}", remedy="Free disk space and run again.")
    return None
