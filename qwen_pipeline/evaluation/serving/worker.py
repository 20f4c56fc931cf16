"""The worker that starts a real server for a checkpoint and queries its API. It runs under vLLM's Python.

The server listens on a free port of the loopback interface and belongs to the worker's process group, which is killed
after the step. Prompts are token ids, decoding is greedy, and every answer includes the likeliest tokens per position.
Models with another head are served by vLLM's pooling runner, without the activation (softmax, normalization) that it
would apply to outputs.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http import HTTPStatus
from math import nan
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from qwen_pipeline.evaluation.serving.findings import (
    PoolingTask,
    ServedCompletion,
    ServerJob,
    ServerRun,
    dump_server_run,
)
from qwen_pipeline.progress import Observe, Progress

SERVER_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Defaults for the server's environment variables. vLLM itself would bind each rank to its own NUMA node."""
LIKELIEST = 5
ANSWER_SECONDS = 600
STOP_SECONDS = 20
_PREFIX = re.compile(r"^\(.*?\] ")
"""The prefix of vLLM's log lines: process, level, time and source."""
_WARNING = re.compile(r"^\(\w+ pid=\d+\) WARNING ")
_EXCEPTION = re.compile(r"[\w.]*(?:Error|Exception)(?P<message>: .+)?")


class ServerFault(Exception):
    """An error of the server: it did not start, or it died."""


def serve(spec: Mapping[str, Any], observe: Observe) -> Mapping[str, Any]:
    """Run a :class:`ServerJob` and return a :class:`ServerRun`, both as JSON values; a server fault is a finding."""
    job = ServerJob.from_json(spec)
    log = Path(job.log)
    ready, answers, outputs = False, list[ServedCompletion](), list[tuple[float, ...]]()
    try:
        with _server(job, log) as (server, url):
            _await_ready(job, server, url, log, observe)
            ready = True
            for number, prompt in enumerate(job.prompts):
                if job.pooling:
                    outputs += _pool(url, prompt, job.pooling)
                else:
                    answers.append(_complete(url, prompt, job.max_new_tokens))
                observe(Progress(task=job.title, done=number + 1, total=len(job.prompts), unit="answers"))
    except (ServerFault, OSError) as error:
        return dump_server_run(ServerRun(ready=ready, fault=_cause(log) or f"{error} ({_last_line(log)})"))
    return dump_server_run(ServerRun(ready=True, answers=tuple(answers), outputs=tuple(outputs)))


@contextmanager
def _server(job: ServerJob, log: Path) -> Generator[tuple[subprocess.Popen[bytes], str], None, None]:
    port = _free_port()
    with log.open("ab") as output:
        server = subprocess.Popen(
            _command(job, port),
            env={**SERVER_ENVIRONMENT, "OMP_NUM_THREADS": str(_threads(job.degree)), **os.environ},
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
        )
    try:
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(STOP_SECONDS)


def _threads(degree: int) -> int:
    """Return the number of threads of a rank; with more threads than cores, they would spin in every product."""
    return max(1, len(os.sched_getaffinity(0)) // degree)


def _command(job: ServerJob, port: int) -> list[str]:
    """Return vLLM's command line. It ignores the generation config, whose penalties would change greedy answers."""
    max_model_len = max(map(len, job.prompts)) + job.max_new_tokens
    options = {
        "--model": job.root,
        "--served-model-name": "checkpoint",
        "--host": "127.0.0.1",
        "--port": str(port),
        "--tensor-parallel-size": str(job.degree),
        "--max-model-len": str(max_model_len),
        "--max-num-seqs": "4",
        "--generation-config": "vllm",
        **(_pooling_options(job.pooling) if job.pooling else {}),
    }
    arguments = [word for option in options.items() for word in option]
    return [sys.executable, "-P", "-m", job.module, *arguments, "--enforce-eager", *job.arguments]


def _pooling_options(task: PoolingTask) -> dict[str, str]:
    """Return vLLM's options for a model with another head, whichever class the config declares."""
    return {
        "--runner": "pooling",
        "--convert": "embed" if task == "embed" else "classify",
        "--pooler-config": json.dumps({"task": task}),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _await_ready(job: ServerJob, server: subprocess.Popen[bytes], url: str, log: Path, observe: Observe) -> None:
    started = time.monotonic()
    while (elapsed := time.monotonic() - started) < job.ready_seconds:
        if (code := server.poll()) is not None:
            raise ServerFault(f"the server exited with code {code} before it was ready")
        with suppress(URLError, OSError), urlopen(f"{url}/health", timeout=5) as reply:  # noqa: S310
            if reply.status == HTTPStatus.OK:
                return
        observe(
            Progress(task=job.title, done=int(elapsed), total=job.ready_seconds, unit="seconds", remark=_last_line(log))
        )
        time.sleep(0.5)
    raise ServerFault(f"the server was not ready after {job.ready_seconds} seconds")


def _complete(url: str, prompt: Sequence[int], max_new_tokens: int) -> ServedCompletion:
    body = {
        "model": "checkpoint",
        "prompt": list(prompt),
        "max_tokens": max_new_tokens,
        "temperature": 0,
        "logprobs": LIKELIEST,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
    }
    choice = _post(f"{url}/v1/completions", body)["choices"][0]
    likeliest = choice["logprobs"]["top_logprobs"]
    return ServedCompletion(
        tokens=tuple(choice["token_ids"]),
        ended=choice["finish_reason"] == "stop",
        likeliest=tuple({_token_id(name): value for name, value in position.items()} for position in likeliest),
    )


def _pool(url: str, text: Sequence[int], task: PoolingTask) -> list[tuple[float, ...]]:
    """Return the output of a text, or of each of its tokens; vLLM writes NaN as null."""
    data = _post(f"{url}/pooling", pooling_request(text, task))["data"][0]["data"]
    rows = data if isinstance(data[0], list) else [data]
    return [tuple(nan if value is None else float(value) for value in row) for row in rows]


def pooling_request(text: Sequence[int], task: PoolingTask) -> dict[str, Any]:
    """Return the body of a request for the output of a text."""
    return {
        "model": "checkpoint",
        "input": list(text),
        "task": task,
        "use_activation": False,
        "encoding_format": "float",
    }


def _post(url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
    try:
        with urlopen(request, timeout=ANSWER_SECONDS) as reply:  # noqa: S310
            return json.load(reply)
    except HTTPError as error:
        said = error.read(300).decode(errors="replace")
        raise ServerFault(f"the server answered {error.code} {error.reason}: {said}") from error


def _token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def _cause(log: Path) -> str | None:
    """Return the first exception in the log, which causes later ones; without a message, the line before is added.

    An exception in a warning, such as that of a request to warm up, ended nothing.
    """
    before, lines = "", log.read_text(errors="replace").splitlines()
    for line in (_PREFIX.sub("", each) for each in lines if not _WARNING.match(each)):
        if found := _EXCEPTION.fullmatch(line):
            return (line if found["message"] else f"{line} ({before})")[:600]
        before = line.strip(" ^~") or before
    return None


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return _PREFIX.sub("", lines[-1]).strip()[-100:] if lines else ""
