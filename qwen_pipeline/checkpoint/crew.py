"""Jobs over a few threads, begun in order; a job may wait for what those begun earlier bring.

Each block is read, computed, hashed and written by one thread from beginning to end, so what is in memory is a few
blocks for each thread, whatever the size of a tensor. Reading, arithmetic, hashing and writing all release Python's
lock. The oldest job never waits, so some job always moves on.
"""

import os
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from qwen_pipeline.checkpoint.buffers import Pool, recycling

T = TypeVar("T")

CALLER, NOT_BEGUN = -1, sys.maxsize
"""Where jobs have numbers: the calling thread, and a job that could not be taken."""
MOST_THREADS = 21
"""Six blocks of 8 MiB for each of them (:mod:`~qwen_pipeline.checkpoint.admission`) are just less than 1 GiB."""
TICK_SECONDS = 0.2
"""How often whoever set a crew to work gets to look up."""


def crew_size() -> int:
    """Threads of a crew: two more than the cores it may use, since some wait for a disk or for their turn."""
    return min(len(os.sched_getaffinity(0)) + 2, MOST_THREADS)


def work_in_order(jobs: Iterable[T], do: Callable[[T], None], *, tick: Callable[[], None] = lambda: None) -> None:
    """Do every job on one of a few threads, begun in the order given; the first fault ends all and is raised here.

    Args:
        jobs: Taken one by one as threads become free, never by two threads at once.
        do: May use :func:`take_turn`.
        tick: Called every :data:`TICK_SECONDS` and at the end, on the calling thread.
    """
    crew = _Crew(jobs)
    threads = [threading.Thread(target=_serve, args=(crew, do)) for _ in range(crew_size())]
    with _torch_threads_restored():
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(TICK_SECONDS)
                    tick()
        except BaseException as fault:
            crew.stop(fault, CALLER)
            raise
        finally:
            for thread in threads:
                if thread.ident:
                    thread.join()
    if crew.fault:
        raise crew.fault
    tick()


def take_turn(ready: Callable[[], bool], claim: Callable[[], bool]) -> bool:
    """Wait until something is so, or until no job begun earlier is left that could make it so; then try to claim it.

    Outside of a job nothing can be claimed.
    """
    job = _thread.job
    return bool(job) and job.crew.turn(ready, claim, job.number)


def tell_waiting(change: Callable[[], None]) -> None:
    """Within a job, change what others may wait for."""
    assert _thread.job, "only a job is waited for"
    _thread.job.crew.move(change)


class SharedWork(Generic[T]):
    """Work that several threads want done: each does what none has begun, and waits for the rest."""

    def __init__(self, parts: Sequence[Callable[[], T]]) -> None:
        self._waiting = list(enumerate(parts))[::-1]
        self._results: dict[int, T] = {}
        self._count = len(parts)
        self._fault: BaseException | None = None
        self._changed = threading.Condition()

    def all_done(self) -> list[T]:
        """Return every part's result, in their order; the first fault ends all and is raised by all."""
        while part := self._take():
            number, work = part
            try:
                result = work()
            except BaseException as fault:
                self._note(partial(setattr, self, "_fault", fault))
                raise
            self._note(partial(self._results.__setitem__, number, result))
        with self._changed:
            self._changed.wait_for(lambda: self._fault or len(self._results) == self._count)
        if self._fault:
            raise self._fault
        return [self._results[number] for number in range(self._count)]

    def _take(self) -> tuple[int, Callable[[], T]] | None:
        with self._changed:
            return self._waiting.pop() if self._waiting and not self._fault else None

    def _note(self, change: Callable[[], object]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()


class _Stopped(Exception):
    """An older job failed: what this one waits for will not come."""


class _Crew(Generic[T]):
    def __init__(self, jobs: Iterable[T]) -> None:
        self._jobs = enumerate(jobs)
        self._moved = threading.Condition()
        self._running: set[int] = set()
        self._failed = 0
        self.fault: BaseException | None = None

    def begin(self) -> tuple[int, T] | None:
        """Take the next job, if there is one and nothing failed."""
        with self._moved:
            if self.fault is None and (taken := next(self._jobs, None)):
                self._running.add(taken[0])
                return taken
        return None

    def end(self, number: int) -> None:
        self.move(lambda: self._running.remove(number))

    def stop(self, fault: BaseException, number: int) -> None:
        """Begin nothing more and end what is younger.

        Older jobs go on: the oldest fault counts, so that the same work fails the same way.
        """
        with self._moved:
            if self.fault is None or number < self._failed:
                self.fault, self._failed = fault, number
            self._moved.notify_all()

    def turn(self, ready: Callable[[], bool], claim: Callable[[], bool], number: int) -> bool:
        """Wait until something is so, or until no older job is left that could make it so; then try to claim it."""
        with self._moved:
            self._moved.wait_for(lambda: self._is_over(number) or ready() or number == min(self._running))
            if self._is_over(number):
                raise _Stopped
            return claim()

    def _is_over(self, number: int) -> bool:
        return self.fault is not None and self._failed < number

    def move(self, change: Callable[[], None]) -> None:
        """Change what others may wait for."""
        with self._moved:
            change()
            self._moved.notify_all()


@dataclass(frozen=True, slots=True)
class _Job:
    crew: _Crew[Any]
    number: int


class _Thread(threading.local):
    job: _Job | None = None


_thread = _Thread()


def _serve(crew: _Crew[T], do: Callable[[T], None]) -> None:
    import torch

    torch.set_num_threads(1)
    with recycling(Pool()):
        number = NOT_BEGUN
        try:
            while taken := crew.begin():
                number, job = taken
                _thread.job = _Job(crew, number)
                do(job)
                crew.end(number)
                number = NOT_BEGUN
        except _Stopped:
            return
        except BaseException as fault:
            crew.stop(fault, number)


@contextmanager
def _torch_threads_restored() -> Generator[None, None, None]:
    """Leave the process's number of torch threads as it was: each of the crew's threads sets it to one."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
