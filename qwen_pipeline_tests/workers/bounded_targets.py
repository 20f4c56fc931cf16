"""The objects that the bounded processes under test make."""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from qwen_pipeline.errors import InputRefused


def make(spec: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return an object that does what a request says."""
    if spec.get("refuse"):
        raise InputRefused("the spec", remedy="give another")
    return lambda request: _DO[request["do"]]({**request, "spec": dict(spec)})


def echo(request: Mapping[str, Any]) -> Any:
    return {"request": request, "pid": os.getpid()}


def refuse(_: object) -> None:
    raise InputRefused("the request", remedy="ask another")


def fail(_: object) -> None:
    raise KeyError("a slip")


def loop(_: object) -> None:
    while True:
        pass


def write(_: object) -> None:
    while True:
        os.write(1, b"x" * 2**20)


def abort(_: object) -> None:
    os.write(2, b"no memory\n")
    os.abort()


_DO: Mapping[str, Callable[[Any], Any]] = {
    "echo": echo,
    "refuse": refuse,
    "fail": fail,
    "loop": loop,
    "wait": lambda _: time.sleep(60),
    "grow": lambda _: len(bytearray(2**40)),
    "abort": abort,
    "exit": lambda _: os._exit(3),
    "write": write,
    "secret": lambda _: sorted(name for name in os.environ if name.startswith(("QWEN_PIPELINE_", "HF_TOKEN"))),
    "repeat": lambda request: "a" * request["times"],
}
