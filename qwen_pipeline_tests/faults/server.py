"""A process with the shim that forks a child for each fault, so that the imports are paid once.

Requests and answers are lines of JSON. Run it with ``LD_PRELOAD`` set to the compiled ``shim.c``.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import pytest

from qwen_pipeline.cli.results import as_fault, exit_code
from qwen_pipeline.errors import PipelineError
from qwen_pipeline_tests.faults.steps import Inputs, steps, without_processes

SECONDS = 120
_SHIM: Any = ctypes.CDLL(None)


def main() -> None:
    without_processes(pytest.MonkeyPatch())
    for line in sys.stdin:
        print(json.dumps(_disturbed(json.loads(line))), flush=True)


def _disturbed(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run the chain in a child with a fault; return its outcome."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reading)
        _run(request, writing)
    os.close(writing)
    began = time.monotonic()
    outcome: dict[str, Any] = {}
    while True:
        done, status = os.waitpid(child, os.WUNTRACED | os.WNOHANG)
        if done and os.WIFSTOPPED(status):
            with contextlib.suppress(FileNotFoundError):
                _act(request)
            os.kill(child, signal.SIGCONT)
        elif done:
            outcome["code"] = os.waitstatus_to_exitcode(status)
            break
        elif time.monotonic() - began > SECONDS:
            os.kill(child, signal.SIGKILL)
            outcome["hung"] = True
        time.sleep(0.002)
    with os.fdopen(reading) as answer:
        outcome |= json.loads(answer.read() or "{}")
    return {**outcome, "seconds": time.monotonic() - began}


def _act(request: Mapping[str, Any]) -> None:
    """Do to the files of a stopped child what another process might."""
    out, target = Path(request["out"]), Path(request["target"])
    match request["action"]:
        case "remove workspace":
            shutil.rmtree(out)
        case "truncate":
            os.truncate(target, target.stat().st_size // 2)
        case "replace":
            data = bytearray(target.read_bytes())
            data[-1] ^= 255
            target.unlink()
            target.write_bytes(data)
        case "remove input":
            target.unlink()
        case action:
            raise AssertionError(action)


def _run(request: Mapping[str, Any], answer: int) -> NoReturn:
    names = [field.name for field in fields(Inputs)]
    inputs = Inputs(**{name: Path(request["inputs"][name]) for name in names if request["inputs"][name]})
    if jump := request.get("jump"):
        real = time.time
        began = real()
        time.time = lambda: real() + (jump if real() - began > 0.1 else 0)
    _SHIM.fault_arm(
        request["below"].encode(), *(ctypes.c_long(request["nth"]), request["mode"], request["value"], request["mask"])
    )
    outcome: dict[str, Any] = {}
    for name, step in steps(inputs, Path(request["out"])).items():
        try:
            step()
        except BaseException as error:
            fault = as_fault(error)
            outcome = {
                "step": name,
                "kind": type(fault).__name__,
                "exit_code": exit_code(fault),
                "cause": type(error).__name__,
            }
            if isinstance(fault, PipelineError):
                outcome |= {"what": fault.what, "remedy": fault.remedy}
            else:
                outcome["traceback"] = "".join(traceback.format_exception(error))
            break
    outcome |= {"count": _SHIM.fault_count(), "fired": _SHIM.fault_fired()}
    _SHIM.fault_disarm()
    os.write(answer, json.dumps(outcome).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
