"""A stand-in for bounded objects whose process is kept: each of many examples would pay for a fork otherwise.

Requests, limits and errors are those of :class:`~qwen_pipeline.workers.bounded.BoundedObject`.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from qwen_pipeline.errors import WorkerFailed
from qwen_pipeline.text import tokenizer_service as tokenizer_service  # for the processes, which are forks
from qwen_pipeline.workers.bounded import BoundedObject, LimitExceeded, Limits

_MADE = 500
"""Objects that a process makes before another takes its place, since its memory is limited as a whole."""
_process: list[BoundedObject] = []
_made = 0


class KeptObject:
    """An object in a process that it shares with those before it; it can be used until the next one is made."""

    def __init__(self, target: str, spec: Mapping[str, Any], limits: Limits) -> None:
        global _made
        if not _process or _made >= _MADE:
            _end()
            _process.append(BoundedObject(f"{__name__}:maker", {}, limits))
            _made = 0
        _made += 1
        self.call({"target": target, "spec": spec}, limits)

    def call(self, request: object, limits: Limits) -> Any:
        try:
            return _process[0].call(request, limits)
        except (LimitExceeded, WorkerFailed):
            _end()
            raise

    def close(self) -> None:
        """Leave the process to the next object."""


def _end() -> None:
    while _process:
        _process.pop().close()


def maker(_: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    """Return a function that makes an object of a request with a target, and forwards others to the one made last."""
    made: list[Callable[[Any], Any]] = []

    def answer(request: Mapping[str, Any]) -> Any:
        if "target" not in request:
            return made[0](request)
        module, _, name = request["target"].partition(":")
        made[:] = [getattr(import_module(module), name)(request["spec"])]
        return None

    return answer
