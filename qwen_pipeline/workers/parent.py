"""Running one function in another Python environment, in a process group that is always terminated.

The function's spec is sent as JSON on standard input. Progress, the result or an error come back as JSON lines on a
separate pipe, and the output of libraries goes to a log file. A worker may be started before its task is known: it
imports its packages and waits.
"""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import qwen_pipeline
from qwen_pipeline import errors
from qwen_pipeline.errors import EnvironmentFault, PipelineError, WorkerFailed
from qwen_pipeline.progress import Observe, Progress, unobserved

GRACE_SECONDS = 5.0
"""The time between SIGTERM and SIGKILL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerResult:
    """The return value of the function, and figures of its process.

    Attributes:
        value: The return value.
        peak_memory_bytes: Highest resident memory of the process.
        import_seconds: The time that importing the function's module and the packages took.
        early_seconds: The part of it that had passed when the task was sent.
    """

    value: Mapping[str, Any]
    peak_memory_bytes: int
    import_seconds: float
    early_seconds: float


def run_worker(
    python: Path,
    target: str,
    spec: Mapping[str, Any],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    observe: Observe = unobserved,
) -> WorkerResult:
    """Start a worker and run its task: see :func:`started_worker` and :meth:`Worker.run`."""
    with started_worker(python, target, env=env) as worker:
        return worker.run(spec, log=log, observe=observe)


@contextmanager
def started_worker(
    python: Path, target: str, *, packages: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Generator["Worker", None, None]:
    """Start a process that will call ``target``, a ``package.module:function`` of a spec and an observer.

    It imports the function's module and the packages, and waits for its task. After the body, the process and all that
    it started are terminated; so they are when the thread that started it ends.

    The worker imports this copy of the package. The directory that contains it is put at the *end* of the other
    interpreter's path, so that the environment's own versions of shared dependencies take precedence.

    Args:
        python: The interpreter.
        target: The function.
        packages: Packages to import after the function's own module.
        env: Environment variables in addition to those of this process.

    Raises:
        EnvironmentFault: The interpreter cannot be started.
    """
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as messages, tempfile.TemporaryFile() as printed:
        channel = {"QWEN_PIPELINE_MESSAGES_FD": str(writing), "QWEN_PIPELINE_PARENT": str(os.getpid())}
        try:
            process = subprocess.Popen(
                [str(python), "-P", "-c", bootstrap("child"), target, *packages],
                env={**os.environ, **(env or {}), **channel},
                stdin=subprocess.PIPE,
                stdout=printed,
                stderr=printed,
                pass_fds=(writing,),
                start_new_session=True,
            )
        except OSError as error:
            raise EnvironmentFault(
                f"{python} cannot be started: {error.strerror}.", remedy="Install the engine's environment."
            ) from error
        finally:
            os.close(writing)
        with process, _ending_group(process):
            yield Worker(target=target, process=process, messages=messages, printed=printed.fileno())


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A process that waits for a task, and ends after it.

    Attributes:
        target: The function that it calls.
        process: The process.
        messages: Its messages, one JSON line each.
        printed: Descriptor of a file with the output of libraries until the log exists.
    """

    target: str
    process: subprocess.Popen[bytes]
    messages: IO[bytes]
    printed: int

    def run(self, spec: Mapping[str, Any], *, log: Path, observe: Observe = unobserved) -> WorkerResult:
        """Run its task and wait for the process to end: see :meth:`run_task` and :meth:`require_end`."""
        result = self.run_task(spec, log=log, observe=observe)
        self.require_end(log=log)
        return result

    def run_task(self, spec: Mapping[str, Any], *, log: Path, observe: Observe = unobserved) -> WorkerResult:
        """Run its task and return the result as soon as it arrives, while the process may still be ending.

        Args:
            spec: The function's first argument, as JSON.
            log: The file for the output of libraries.
            observe: Called with the function's progress.

        Raises:
            PipelineError: The function raised an error of this package; it has the same class.
            EnvironmentFault: The process was killed, as by the kernel when memory runs out.
            WorkerFailed: The process ended without a result. The message quotes the end of its log.
        """
        try:
            self._send_task({"spec": spec, "log": str(log.absolute()), "time": time.monotonic()})
            result = _follow(self.messages, observe)
            code = self.process.wait() if result is None else 0
        finally:
            with log.open("ab") as file:  # the worker moves it to the log itself, unless it ends before that
                file.write(os.pread(self.printed, os.fstat(self.printed).st_size, 0))
        if result is None:
            raise _ended(self.target, code, log, "before")
        return result

    def require_end(self, *, log: Path) -> None:
        """Wait for the process to end, after which its log is complete.

        Raises:
            EnvironmentFault: The process was killed.
            WorkerFailed: The process ended with an error, after it had sent its result.
        """
        if code := self.process.wait():
            raise _ended(self.target, code, log, "after")

    def _send_task(self, task: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        with (
            suppress(BrokenPipeError),
            self.process.stdin as stdin,
        ):  # broken if the worker has ended; its log says why
            stdin.write(json.dumps(task).encode())


def bootstrap(module: str) -> str:
    """Return code that runs ``main`` of a module of this folder with the command line's arguments.

    It imports this copy of the package, but prefers the environment's own versions of all others.
    """
    root = str(Path(qwen_pipeline.__file__).parents[1])
    return (
        f"import sys; sys.path.insert(0, {root!r}); import qwen_pipeline; sys.path.append(sys.path.pop(0)); "
        f"from qwen_pipeline.workers.{module} import main; main(*sys.argv[1:])"
    )


def _follow(messages: Iterator[bytes], observe: Observe) -> WorkerResult | None:
    result = None
    for line in messages:
        kind, content = json.loads(line)
        match kind:
            case "progress":
                observe(Progress(**content))
            case "result":
                result = WorkerResult(**content)
            case "fault":
                raise load_error(content)
            case _:
                raise AssertionError(f"unknown message {kind!r}")
    return result


def load_error(content: Mapping[str, str]) -> PipelineError:
    """Return the error that a worker sent."""
    kind = getattr(errors, content["kind"], PipelineError)
    return kind(content["what"], remedy=content["remedy"])


def _ended(target: str, code: int, log: Path, when: Literal["before", "after"]) -> PipelineError:
    """Return the error for a worker that ended ``when`` its result had arrived."""
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    if code == -signal.SIGKILL:
        return EnvironmentFault(
            f"The worker {target} was killed by SIGKILL, most likely by the kernel because memory ran out.",
            remedy=f"Provide more memory, or lower the batch size and the number of samples. Its log: {log}",
        )
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return WorkerFailed(
        f"The worker {target} {how} {when} its result. The end of its log:\n{tail}", remedy=f"Read the whole log: {log}"
    )


@contextmanager
def _ending_group(worker: subprocess.Popen[bytes]) -> Generator[None, None, None]:
    """After the body, end every process of the worker's group: SIGTERM, then SIGKILL."""
    try:
        yield
    finally:
        for number, timeout in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
            try:
                os.killpg(worker.pid, number)
            except ProcessLookupError:
                break
            try:
                worker.wait(timeout)
            except subprocess.TimeoutExpired:
                continue
