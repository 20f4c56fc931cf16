"""The worker's side: tie our life to the parent's, call the target, report. Runs under an engine's own interpreter."""

import ctypes
import errno
import importlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from qwen_pipeline.checkpoint.measure import resident_peak
from qwen_pipeline.errors import EnvironmentFault, PipelineError
from qwen_pipeline.progress import Observe, Progress

Target = Callable[[Mapping[str, Any], Observe], Mapping[str, Any]]

_PR_SET_PDEATHSIG = 1


def main(target: str) -> None:
    """Run ``package.module:function`` with the spec from standard input, then exit."""
    sys.exit(_call(target))


def _call(target: str) -> int:
    _die_with_parent()
    _take_the_group_along()
    with os.fdopen(int(os.environ["QWEN_PIPELINE_MESSAGES_FD"]), "wb", buffering=0) as messages:

        def send(kind: str, content: Mapping[str, Any]) -> None:
            messages.write(json.dumps([kind, content]).encode() + b"\n")

        def observe(progress: Progress) -> None:
            send("progress", asdict(progress))

        spec, began = json.load(sys.stdin), time.perf_counter()
        try:
            function = _function(target)
            import_seconds = time.perf_counter() - began
            value = function(spec, observe)
        except PipelineError as fault:
            send("fault", {"kind": type(fault).__name__, "what": fault.what, "remedy": fault.remedy})
            return fault.exit_code
        except Exception as error:
            if fault := _fault_of_the_machine(error):
                send("fault", {"kind": "EnvironmentFault", "what": fault.what, "remedy": fault.remedy})
                return fault.exit_code
            raise
        figures = {"peak_memory_bytes": resident_peak(), "import_seconds": import_seconds}
        send("result", {"value": value, **figures})
    return 0


def _function(target: str) -> Target:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


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
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error):
        return EnvironmentFault(
            f"Memory ran out: {error}", remedy="Lower the batch size or the number of samples, or use a larger machine."
        )
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
        return EnvironmentFault(f"The disk is full: {error}", remedy="Free disk space and run again.")
    return None
