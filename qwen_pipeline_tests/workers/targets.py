"""What the workers under test run."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_pipeline.errors import AdapterRefused
from qwen_pipeline.progress import Observe, Progress


def echo(spec: Mapping[str, Any], observe: Observe) -> Mapping[str, Any]:
    print("a library that prints")
    print("a library that complains", file=sys.stderr)
    observe(Progress(task="echo", done=1, total=2, unit="layers", remark="half"))
    return {"spec": dict(spec), "pid": os.getpid(), "TOKEN": os.environ.get("TOKEN")}


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


def fill_disk(_: Mapping[str, Any], __: Observe) -> Mapping[str, Any]:
    Path("/dev/full").write_text("x" * 10_000)
    return {}


def linger(spec: Mapping[str, Any], observe: Observe) -> Mapping[str, Any]:
    """Start a grandchild, write both pids, and stay."""
    grandchild = subprocess.Popen(["sleep", "600"])
    Path(spec["pids"]).write_text(f"{os.getpid()} {grandchild.pid}")
    observe(Progress(task="linger", done=0, total=1))
    time.sleep(600)
    return {}
