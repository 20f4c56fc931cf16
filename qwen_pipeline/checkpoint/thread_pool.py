"""Jobs over a few threads, begun in order.

Each block is read, computed, hashed and written by one thread from beginning to end, so what is in memory is a few
blocks for each thread, whatever the size of a tensor. Reading, arithmetic, hashing and writing all release Python's
lock.
"""

import os
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Generic, TypeVar

from qwen_pipeline.checkpoint.buffers import BufferPool, recycling

T = TypeVar("T")

CALLER, NOT_BEGUN = -1, sys.maxsize
"""Where jobs have numbers: the calling thread, and a job that could not be taken."""
MOST_THREADS = 18
"""What each of them holds, 56 MiB (:mod:`~qwen_pipeline.checkpoint.memory_budget`), is just less than 1 GiB in all."""
TICK_SECONDS = 0.2
"""How often whoever set a crew to work gets to look up."""


def pool_size() -> int:
    """Threads of a crew: two more than the cores it may use, since some wait for a disk."""
    return min(len(os.sched_getaffinity(0)) + 2, MOST_THREADS)


def map_ordered(jobs: Iterable[T], do: Callable[[T], None], *, tick: Callable[[], None] = lambda: None) -> None:
    """Do every job on one of a few threads, begun in the order given; the first fault ends all and is raised here.

    Args:
        jobs: Taken one by one as threads become free, never by two threads at once.
        do: What to do with each.
        tick: Called every :data:`TICK_SECONDS` and at the end, on the calling thread.
    """
    crew = _ThreadPool(jobs)
    threads = [threading.Thread(target=_serve, args=(crew, do)) for _ in range(pool_size())]
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


class _ThreadPool(Generic[T]):
    def __init__(self, jobs: Iterable[T]) -> None:
        self._jobs = enumerate(jobs)
        self._lock = threading.Lock()
        self._failed = 0
        self.fault: BaseException | None = None

    def begin(self) -> tuple[int, T] | None:
        """Take the next job, if there is one and nothing failed."""
        with self._lock:
            return next(self._jobs, None) if self.fault is None else None

    def stop(self, fault: BaseException, number: int) -> None:
        """Begin nothing more; the oldest job's fault counts, so that the same work fails the same way."""
        with self._lock:
            if self.fault is None or number < self._failed:
                self.fault, self._failed = fault, number


def _serve(crew: _ThreadPool[T], do: Callable[[T], None]) -> None:
    import torch

    torch.set_num_threads(1)
    with recycling(BufferPool()):
        number = NOT_BEGUN
        try:
            while taken := crew.begin():
                number, job = taken
                do(job)
                number = NOT_BEGUN
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
