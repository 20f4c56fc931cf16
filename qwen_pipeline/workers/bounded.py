"""Objects made of untrusted files, each in a process of its own, with limits of time and memory for every request.

A server process imports the module that makes such objects, and forks a process for each of them: that takes
milliseconds, while the imports take seconds. Requests and answers are JSON. A process that exceeds a limit is killed,
and so is one whose object is closed or whose caller has ended.
"""

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, NoReturn

from qwen_pipeline.errors import EnvironmentFault, WorkerFailed
from qwen_pipeline.workers.frames import receive, send
from qwen_pipeline.workers.parent import bootstrap, load_error

_MAX_ANSWER_BYTES = 100_000_000
"""The largest answer that is read, apart from 20 times the size of its request."""
_END_SECONDS = 10
_SECRET = ("QWEN_PIPELINE_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_")
"""Beginnings of environment variables that the processes do not get."""
_ENDED_BY_MEMORY = (signal.SIGABRT, signal.SIGKILL)
"""Signals by which libraries in Rust and C++, or the kernel, end a process that gets no memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one request.

    Attributes:
        seconds: Processor time; on a busy machine ten times as much may pass, and a minute.
        memory_bytes: Address space beyond that of the imported packages.
        seconds_per_mb: Further processor time for each megabyte of the request.
        memory_per_byte: Further address space for each byte of the request.
    """

    seconds: float
    memory_bytes: int
    seconds_per_mb: float = 0
    memory_per_byte: int = 0

    def of_request(self, size: int) -> "Limits":
        """Return the limits of a request of a number of bytes."""
        return Limits(
            seconds=self.seconds + self.seconds_per_mb * size / 1e6,
            memory_bytes=self.memory_bytes + self.memory_per_byte * size,
        )

    @property
    def wall_seconds(self) -> float:
        return 60 + 10 * self.seconds


class LimitExceeded(Exception):
    """A request needs more than a limit, which the text names; its process has ended."""


class BoundedObject:
    """An object in a process of its own.

    Args:
        target: The ``package.module:function`` that makes the object, a function that answers requests.
        spec: The function's argument, as JSON.
        limits: Limits of making the object.

    Raises:
        PipelineError: The function raised an error of this package; it has the same class.
        LimitExceeded: It needs too much time or memory.
        WorkerFailed: The process ended by an error.
    """

    def __init__(self, target: str, spec: Mapping[str, Any], limits: Limits) -> None:
        self._target, self._lock = target, threading.Lock()
        self._requests, served = socket.socketpair()
        reading, writing = os.pipe()
        self._report = os.fdopen(reading, "rb")
        try:
            with served:
                _fork(target.partition(":")[0], served.fileno(), writing)
        finally:
            os.close(writing)
        self.call({"target": target, "spec": spec}, limits)

    def call(self, request: object, limits: Limits) -> Any:
        """Return the object's answer to a request; the errors are those of the constructor."""
        content = json.dumps(request, default=str).encode()
        limits = limits.of_request(len(content))
        with self._lock:
            try:
                self._requests.settimeout(limits.wall_seconds)
                send(self._requests, json.dumps([limits.seconds, limits.memory_bytes]).encode())
                send(self._requests, content)
                kind, answer = json.loads(receive(self._requests, most=_MAX_ANSWER_BYTES + 20 * len(content)))
            except TimeoutError:
                self.close()
                raise LimitExceeded(f"{limits.wall_seconds:g} seconds") from None
            except (OSError, EOFError):
                self._raise_ended(limits)
        match kind:
            case "answer":
                return answer
            case "memory":
                self.close()
                raise LimitExceeded(_memory(limits))
            case "fault":
                raise load_error(answer)
            case _:
                raise WorkerFailed(f"{self._target} failed:\n{answer}", remedy="Report this error.")

    def close(self) -> None:
        """End the process."""
        self._requests.close()
        self._report.close()

    def __del__(self) -> None:
        with suppress(AttributeError):  # there was no descriptor left for its sockets
            self.close()

    def _raise_ended(self, limits: Limits) -> NoReturn:
        """Raise the error for a process that has ended, by the report of its monitor."""
        self._requests.close()  # a process that is still writing its answer ends then
        with suppress(OSError, ValueError):
            is_reported, _, _ = select.select([self._report], [], [], _END_SECONDS)
            report = self._report.read() if is_reported else b""
            self.close()
            ended = json.loads(report)
            if ended["signal"] == signal.SIGXCPU:
                raise LimitExceeded(f"{limits.seconds:g} seconds of processor time")
            if ended["signal"] in _ENDED_BY_MEMORY:
                raise LimitExceeded(_memory(limits))
            how = f"signal {ended['signal']}" if ended["signal"] else f"exit code {ended['code']}"
            raise WorkerFailed(f"The process of {self._target} ended with {how}: {ended['log']}", remedy=_AGAIN)
        raise WorkerFailed(f"The process of {self._target} has ended: {_server_log()}", remedy=_AGAIN)


_AGAIN = "Run it again; if it fails again, look for other files of the same kind."


def _memory(limits: Limits) -> str:
    return f"{limits.memory_bytes / 1e9:.1f} GB of memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Server:
    """The server of a module.

    Attributes:
        owner: The process that started it; a fork of that needs a server of its own.
    """

    process: subprocess.Popen[bytes]
    control: socket.socket
    log: IO[bytes]
    owner: int

    def end(self) -> None:
        if self.owner == os.getpid():
            self.control.close()
            self.process.wait()


_servers: dict[str, _Server] = {}
_starting = threading.Lock()


def start_server(module: str) -> None:
    """Start the server of a module, if it is not running, so that it imports while the caller does something else.

    Raises:
        EnvironmentFault: It cannot be started.
    """
    with _starting:
        server = _servers.get(module)
        if server is None or server.owner != os.getpid() or server.process.poll() is not None:
            _servers[module] = _started(module)


def _started(module: str) -> _Server:
    control, served = socket.socketpair()
    log = tempfile.TemporaryFile()  # noqa: SIM115
    command = [sys.executable, "-P", "-c", bootstrap("bounded_server"), module, str(served.fileno())]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_SECRET)}
    try:
        process = subprocess.Popen(
            command,
            env={**kept, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(served.fileno(),),
            start_new_session=True,
        )
    except OSError as error:
        raise EnvironmentFault(f"No process can be started: {error}.", remedy="End other processes.") from error
    finally:
        served.close()
    server = _Server(process=process, control=control, log=log, owner=os.getpid())
    atexit.register(server.end)
    return server


def _fork(module: str, requests: int, report: int) -> None:
    """Have the server fork a process with a socket for requests, and a pipe for the report of its end."""
    start_server(module)
    with _starting, suppress(ConnectionError):  # the caller finds its socket closed, and reports the server's log
        socket.send_fds(_servers[module].control, [b"+"], [requests, report])


def _server_log() -> str:
    logs = [os.pread(server.log.fileno(), 2**16, 0).decode(errors="replace") for server in _servers.values()]
    return "\n".join(logs).strip()[-2000:]
