"""The worker's side: tie our life to the parent's, import, call the target, report.

Runs under an engine's own interpreter.
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
"""As CUDA's libraries say it, and as torch says it of the host's memory in a plain RuntimeError."""


def main(target: str, *packages: str) -> None:
    """Import ``package.module:function`` and more packages, run it with the task from standard input, then exit."""
    with fast_exit():
        sys.exit(_call(target, packages))


def _call(target: str, packages: Sequence[str]) -> int:
    _die_with_parent()
    _take_the_group_along()
    try:
        began = time.monotonic()
        function = _function(target)
        for package in packages:
            importlib.import_module(package)
        imported = time.monotonic()
        task = json.load(sys.stdin)
        _print_into(task["log"])
        value = function(task["spec"], _observe)
        handed_over = min(max(task["time"], began), imported)
        figures = {"import_seconds": imported - began, "early_seconds": handed_over - began}
        _send("result", {"value": value, "peak_memory_bytes": resident_peak(), **figures})
    except Exception as error:
        if fault := report(error):
            return fault.exit_code
        raise
    finally:
        os.close(int(os.environ.pop(_MESSAGES_FD)))
    return 0


def report(error: Exception) -> PipelineError | None:
    """Tell the parent of an error, if it is one of ours or of the machine, and return it as one of ours.

    For what a target raises, and for the threads of a library that ends the process at an error in one of them.
    """
    fault = error if isinstance(error, PipelineError) else _fault_of_the_machine(error)
    if fault and _MESSAGES_FD in os.environ:
        _send("fault", {"kind": type(fault).__name__, "what": fault.what, "remedy": fault.remedy})
    return fault


def _observe(progress: Progress) -> None:
    _send("progress", asdict(progress))


def _send(kind: str, content: Mapping[str, Any]) -> None:
    """Write one message by one call, since threads may write too."""
    os.write(int(os.environ[_MESSAGES_FD]), json.dumps([kind, content]).encode() + b"\n")


def _function(target: str) -> WorkerFunction:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _print_into(log: str) -> None:
    """Have what is printed from now on go into a log, and take there what was printed before there was one."""
    printed, _ = os.pread(1, os.fstat(1).st_size, 0), os.ftruncate(1, 0)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.write(file, printed)
    for stream in (1, 2):
        os.dup2(file, stream)


def _die_with_parent() -> None:
    """Have the kernel kill us when the parent dies, however it dies (on Linux; elsewhere by its clean-up)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(os.environ["QWEN_PIPELINE_PARENT"]):
            sys.exit("the parent is gone already")


def _take_the_group_along() -> None:
    """Leave a keeper outside of our group, which kills what is left of it once we are gone, however we went.

    The kernel's signal reaches us alone; an engine's own processes would live on.
    """
    if sys.platform != "linux":
        return
    group, ourselves = os.getpgid(0), os.pidfd_open(os.getpid())
    if os.fork():
        os.close(ourselves)
        return
    os.setsid()
    os.closerange(0, ourselves)
    os.closerange(ourselves + 1, os.sysconf("SC_OPEN_MAX"))
    select.select([ourselves], [], [])
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    os._exit(0)


def _fault_of_the_machine(error: Exception) -> EnvironmentFault | None:
    """Name the end of memory (the host's or the GPU's) or of disk space, which libraries raise as several classes."""
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
