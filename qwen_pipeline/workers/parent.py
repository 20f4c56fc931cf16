"""Run one function in another Python environment, in a process group of which nothing survives.

The function's spec goes in as JSON on standard input; progress, result or a named fault come back as JSON lines on a
pipe of their own. Whatever libraries print goes to a log file. A worker may be started before its task is known: it
imports what it will need, and waits.
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
from qwen_pipeline.errors import EngineFault, EnvironmentFault, PipelineError
from qwen_pipeline.progress import Observe, Progress, unobserved

GRACE_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerResult:
    """What the function returned, and what is known of its process.

    Attributes:
        peak_memory_bytes: Its highest resident memory.
        import_seconds: What the function's module, and all that it needs, took to be imported.
        early_seconds: How much of that had passed when the worker was given its task.
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
    """Start a worker and give it its task: see :func:`started_worker` and :meth:`Worker.run`."""
    with started_worker(python, target, env=env) as worker:
        return worker.run(spec, log=log, observe=observe)


@contextmanager
def started_worker(
    python: Path, target: str, *, packages: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Generator["Worker", None, None]:
    """Start a process that will call ``target`` (``package.module:function``, taking a spec and an observer).

    It imports what it needs and waits for its task. After the body it ends with all that it started; so it does with
    the thread that started it.

    The worker imports this copy of the package. What lies beside it is put at the *end* of the other interpreter's
    path, so that the environment's own versions of shared dependencies win.

    Args:
        python: The interpreter.
        target: What to call.
        packages: Imported after the function's own module.
        env: Variables beside our own.

    Raises:
        EnvironmentFault: There is no such interpreter.
    """
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as messages, tempfile.TemporaryFile() as printed:
        channel = {"QWEN_PIPELINE_MESSAGES_FD": str(writing), "QWEN_PIPELINE_PARENT": str(os.getpid())}
        try:
            process = subprocess.Popen(
                [str(python), "-P", "-c", _bootstrap(), target, *packages],
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
    """A process that waits for its one task.

    Attributes:
        messages: What it tells us, line by line.
        printed: A file with what libraries print until there is a log.
    """

    target: str
    process: subprocess.Popen[bytes]
    messages: IO[bytes]
    printed: int

    def run(self, spec: Mapping[str, Any], *, log: Path, observe: Observe = unobserved) -> WorkerResult:
        """Have it call its target, and wait for it to end: see :meth:`deliver` and :meth:`require_end`."""
        result = self.deliver(spec, log=log, observe=observe)
        self.require_end(log=log)
        return result

    def deliver(self, spec: Mapping[str, Any], *, log: Path, observe: Observe = unobserved) -> WorkerResult:
        """Have it call its target, and return the result as soon as it is there: the process has still to end.

        Args:
            spec: The function's first argument, as JSON.
            log: Gets whatever libraries print.
            observe: Told what the function tells its observer.

        Raises:
            PipelineError: The fault that the function raised, of the same class.
            EnvironmentFault: The process was killed, as by the kernel when memory runs out.
            EngineFault: The process ended without a result; the end of its log is quoted.
        """
        try:
            self._hand_over({"spec": spec, "log": str(log.absolute()), "time": time.monotonic()})
            result = _follow(self.messages, observe)
            code = self.process.wait() if result is None else 0
        finally:
            with log.open("ab") as file:  # it takes this along itself, unless it ends before
                file.write(os.pread(self.printed, os.fstat(self.printed).st_size, 0))
        if result is None:
            raise _death(self.target, code, log, "before")
        return result

    def require_end(self, *, log: Path) -> None:
        """Wait for the process to end, and its log with it.

        Raises:
            EnvironmentFault: It was killed.
            EngineFault: It ended badly, although it had delivered.
        """
        if code := self.process.wait():
            raise _death(self.target, code, log, "after")

    def _hand_over(self, task: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError), self.process.stdin as stdin:  # broken if it died at once; its log says why
            stdin.write(json.dumps(task).encode())


def _bootstrap() -> str:
    """Import this very package, whichever the environment has, but nothing else that lies beside it."""
    root = str(Path(qwen_pipeline.__file__).parents[1])
    return (
        f"import sys; sys.path.insert(0, {root!r}); import qwen_pipeline; sys.path.append(sys.path.pop(0)); "
        "from qwen_pipeline.workers.child import main; main(*sys.argv[1:])"
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
                raise _fault(content)
            case _:
                raise AssertionError(f"unknown message {kind!r}")
    return result


def _fault(content: Mapping[str, str]) -> PipelineError:
    kind = getattr(errors, content["kind"], PipelineError)
    return kind(content["what"], remedy=content["remedy"])


def _death(target: str, code: int, log: Path, when: Literal["before", "after"]) -> PipelineError:
    """Say how a worker ended ``when`` its result was there."""
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    if code == -signal.SIGKILL:
        return EnvironmentFault(
            f"The worker {target} was killed by SIGKILL, most likely by the kernel because memory ran out.",
            remedy=f"Give it more memory, or lower the batch size and the number of samples. Its log: {log}",
        )
    how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return EngineFault(
        f"The worker {target} {how} {when} its result. The end of its log:\n{tail}", remedy=f"Read the whole log: {log}"
    )


@contextmanager
def _ending_group(worker: subprocess.Popen[bytes]) -> Generator[None, None, None]:
    """Whatever happens in the body, end every process of the worker's group: TERM, then KILL."""
    try:
        yield
    finally:
        for sign, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
            try:
                os.killpg(worker.pid, sign)
            except ProcessLookupError:
                break
            try:
                worker.wait(patience)
            except subprocess.TimeoutExpired:
                continue
