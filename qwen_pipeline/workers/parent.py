"""Run one function in another Python environment, in a process group of which nothing survives.

The function's spec goes in as JSON on standard input; progress, result or a named fault come back as JSON lines on a
pipe of their own. Whatever libraries print goes to a log file.
"""

import json
import os
import signal
import subprocess
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """

    value: Mapping[str, Any]
    peak_memory_bytes: int
    import_seconds: float


def run_worker(
    python: Path,
    target: str,
    spec: Mapping[str, Any],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    observe: Observe = unobserved,
) -> WorkerResult:
    """Call ``target`` (``package.module:function``, taking the spec and an observer) under another interpreter.

    The worker imports this copy of the package. What lies beside it is put at the *end* of the other interpreter's
    path, so that the environment's own versions of shared dependencies win.

    Raises:
        PipelineError: The fault that the function raised, of the same class.
        EnvironmentFault: The process was killed, as by the kernel when memory runs out.
        EngineFault: The process ended without a result; the end of its log is quoted.
    """
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as messages, log.open("ab") as output:
        command = [str(python), "-P", "-c", _bootstrap(), target]
        channel = {"QWEN_PIPELINE_MESSAGES_FD": str(writing), "QWEN_PIPELINE_PARENT": str(os.getpid())}
        try:
            worker = subprocess.Popen(
                command,
                env={**os.environ, **(env or {}), **channel},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(writing,),
                start_new_session=True,
            )
        except OSError as error:
            raise EnvironmentFault(
                f"{python} cannot be started: {error.strerror}.", remedy="Install the engine's environment."
            ) from error
        finally:
            os.close(writing)
        with _ending_group(worker):
            _hand_over(worker, spec)
            result = _follow(messages, observe)
            code = worker.wait()
    if result is not None and code == 0:
        return result
    raise _death(target, code, log)


def _bootstrap() -> str:
    """Import this very package, whichever the environment has, but nothing else that lies beside it."""
    root = str(Path(qwen_pipeline.__file__).parents[1])
    return (
        f"import sys; sys.path.insert(0, {root!r}); import qwen_pipeline; sys.path.append(sys.path.pop(0)); "
        "from qwen_pipeline.workers.child import main; main(sys.argv[1])"
    )


def _hand_over(worker: subprocess.Popen[bytes], spec: Mapping[str, Any]) -> None:
    assert worker.stdin is not None
    try:
        worker.stdin.write(json.dumps(spec).encode())
        worker.stdin.close()
    except BrokenPipeError:
        pass  # It died at once; its log says why.


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


def _death(target: str, code: int, log: Path) -> PipelineError:
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    if code == -signal.SIGKILL:
        return EnvironmentFault(
            f"The worker {target} was killed by SIGKILL, most likely by the kernel because memory ran out.",
            remedy=f"Give it more memory, or lower the batch size and the number of samples. Its log: {log}",
        )
    how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code} and no result"
    return EngineFault(f"The worker {target} {how}. The end of its log:\n{tail}", remedy=f"Read the whole log: {log}")


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
