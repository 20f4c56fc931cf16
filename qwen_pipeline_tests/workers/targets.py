"""The functions that the workers under test run."""

import atexit
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qwen_pipeline.errors import AdapterRefused
from qwen_pipeline.progress import Observe, Progress
from qwen_pipeline.workers.child import report


def echo(spec: Mapping[str, Any], observe: Observe) -> Mapping[str, Any]:
    print("a library that prints")
    print("a library that complains", file=sys.stderr)
    observe(Progress(task="echo", done=1, total=2, unit="layers", remark="half"))
    return {"spec": dict(spec), "pid": os.getpid(), "TOKEN": os.environ.get("TOKEN")}


def leave_traces(spec: Mapping[str, Any], _: Observe) -> Mapping[str, Any]:
    """Leave a file at exit, one at the interpreter's shutdown, and text in a buffer."""
    atexit.register(Path(spec["exit"]).touch)
    _left.append(_Trace(spec["end"]))
    sys.stdout.write("printed at the end")
    return {}


def end_slowly(spec: Mapping[str, Any], _: Observe) -> Mapping[str, Any]:
    """At exit, wait until a pipe is opened for writing, and then end with a code."""

    def end() -> None:
        Path(spec["pipe"]).read_bytes()
        os._exit(spec["code"])

    atexit.register(end)
    return {}


class _Trace:
    def __init__(self, path: str) -> None:
        self._path = path

    def __del__(self) -> None:
        os.close(os.open(self._path, os.O_CREAT, 0o600))


_left: list[_Trace] = []


def refuse(spec: Mapping[str, Any], _: Observe) -> Mapping[str, Any]:
    raise AdapterRefused(f"refused {spec['what']}", remedy="give another")


def crash(_: Mapping[str, Any], __: Observe) -> Mapping[str, Any]:
    raise KeyError("the library's own trouble")


def kill_itself(_: Mapping[str, Any], __: Observe) -> Mapping[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def fill_memory(_: Mapping[str, Any], __: Observe) -> Mapping[str, Any]:
    resource.setrlimit(resource.RLIMIT_AS, (64 * 2**30, 64 * 2**30))
    return {"never": len(bytearray(2**40))}


def fill_memory_of_torch(_: Mapping[str, Any], __: Observe) -> Mapping[str, Any]:
    import torch

    resource.setrlimit(resource.RLIMIT_AS, (64 * 2**30, 64 * 2**30))
    return {"never": torch.empty(2**40, dtype=torch.int8).numel()}


def fill_disk(_: Mapping[str, Any], __: Observe) -> Mapping[str, Any]:
    Path("/dev/full").write_text("x" * 10_000)
    return {}


def lose_a_thread(_: Mapping[str, Any], __: Observe) -> Mapping[str, Any]:
    """Act as a library that ends the process when one of its threads runs out of memory."""

    def work() -> None:
        try:
            bytearray(2**62)
        except MemoryError as error:
            report(error)
            os._exit(1)

    with ThreadPoolExecutor(1) as threads:
        threads.submit(work).result()
    return {}


def linger(spec: Mapping[str, Any], observe: Observe) -> Mapping[str, Any]:
    """Start a process, write the pids of both, and keep running."""
    grandchild = subprocess.Popen(["sleep", "600"])
    Path(spec["pids"]).write_text(f"{os.getpid()} {grandchild.pid}")
    observe(Progress(task="linger", done=0, total=1))
    time.sleep(600)
    return {}
