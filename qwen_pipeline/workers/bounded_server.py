"""The server of :mod:`~qwen_pipeline.workers.bounded`: it imports a module, and forks a process for each object.

For each, a monitor is forked first, which forks the process itself, waits for its end and reports that. The server has
no threads, so that its forks are sound.
"""

import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from math import ceil
from pathlib import Path
from typing import Any, NoReturn

from qwen_pipeline.errors import PipelineError
from qwen_pipeline.workers.frames import receive, send

Answer = Callable[[Any], Any]
"""An object: a function that answers requests."""

_MAX_REQUEST_BYTES = 2**40
_MAX_FILE_BYTES = 2**24
_NESTING = 3000
"""The recursion limit, so that what the caller, with the usual one, could write as JSON can be read."""


def main(module: str, control: str) -> None:
    """Import a module, then fork a process for each pair of descriptors from the control socket, until it is closed."""
    importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # monitors are reaped by the kernel
    with socket.socket(fileno=int(control)) as source:
        while True:
            message, descriptors, _, _ = socket.recv_fds(source, 1, 2)
            if not message:
                return
            if os.fork() == 0:
                source.close()
                _monitor(*descriptors)
            for descriptor in descriptors:
                os.close(descriptor)


def _monitor(requests: int, report: int) -> NoReturn:
    """Fork the process, kill it if its caller goes away, and report its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    alive, held = os.pipe()
    log = tempfile.TemporaryFile()  # noqa: SIM115
    if (worker := os.fork()) == 0:
        for descriptor in (alive, report):
            os.close(descriptor)
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        _work(requests)
    os.close(held)
    os.close(requests)
    poll = select.poll()
    poll.register(alive, select.POLLIN)  # its end, when the process ends
    poll.register(report, 0)  # an error, when the caller has closed the other end
    if any(descriptor == report for descriptor, _ in poll.poll()):
        os.kill(worker, signal.SIGKILL)
    _, status = os.waitpid(worker, 0)
    ended = os.waitstatus_to_exitcode(status)
    tail = os.pread(log.fileno(), 2**16, 0).decode(errors="replace").strip()[-1000:]
    try:
        os.write(report, json.dumps({"signal": max(-ended, 0), "code": ended, "log": tail}).encode())
    finally:
        os._exit(0)


def _work(descriptor: int) -> NoReturn:
    """Make the object by the first request, and answer the others until the caller closes the socket."""
    address_space, answer = _address_space(), _make
    sys.setrecursionlimit(_NESTING)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_FILE_BYTES, _MAX_FILE_BYTES))
    with socket.socket(fileno=descriptor) as requests:
        while True:
            try:
                seconds, memory_bytes = json.loads(receive(requests, most=_MAX_REQUEST_BYTES))
                _limit(seconds, address_space + memory_bytes)
                content = receive(requests, most=_MAX_REQUEST_BYTES)
            except (EOFError, ConnectionError):
                os._exit(0)
            kind, value, answer = _answered(answer, content)
            send(requests, json.dumps([kind, value]).encode())


def _make(request: Mapping[str, Any]) -> Answer:
    module, _, name = request["target"].partition(":")
    return getattr(importlib.import_module(module), name)(request["spec"])


def _answered(answer: Answer, request: bytes) -> tuple[str, Any, Answer]:
    """Return the kind of an answer, its content, and the object for further requests, which the first one makes."""
    try:
        value = answer(json.loads(request))
    except MemoryError:
        return "memory", None, answer
    except PipelineError as fault:
        return "fault", {"kind": type(fault).__name__, "what": fault.what, "remedy": fault.remedy}, answer
    except Exception:
        return "error", traceback.format_exc(limit=-5), answer
    return ("answer", None, value) if answer is _make else ("answer", value, answer)


def _limit(seconds: float, address_space: int) -> None:
    used = time.process_time()
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (ceil(used + seconds), hard))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space, hard))


def _address_space() -> int:
    """Return the size of this process's address space in bytes; 0 where the system does not tell."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
