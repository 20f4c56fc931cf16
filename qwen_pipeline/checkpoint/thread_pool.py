"""Running jobs on a few threads, started in order.

Each block is read, computed, hashed and written by one thread from beginning to end, so memory holds a few blocks
for each thread, regardless of the size of a tensor. Reading, arithmetic, hashing and writing all release the GIL.
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

CALLER, NOT_STARTED = -1, sys.maxsize
"""In place of a job's number: the calling thread, and a job that could not be taken."""
MAX_THREADS = 18
"""Each of them holds 56 MiB (:mod:`~qwen_pipeline.checkpoint.memory_budget`): just under 1 GiB in all."""
TICK_SECONDS = 0.2
"""The interval at which ``tick`` of :func:`map_ordered` is called."""


def pool_size() -> int:
    """Return the number of threads: two more than the cores that may be used, since some wait for a disk."""
    return min(len(os.sched_getaffinity(0)) + 2, MAX_THREADS)


def map_ordered(jobs: Iterable[T], do: Callable[[T], None], *, tick: Callable[[], None] = lambda: None) -> None:
    """Call ``do`` with every job on one of a few threads, started in the given order.

    After an error no more jobs start. If several jobs fail, the error of the first in order is raised.

    Args:
        jobs: Taken one by one as threads become free, never by two threads at once.
        do: Does one job.
        tick: Called every :data:`TICK_SECONDS` and at the end, on the calling thread. If it raises, no more jobs start.
    """
    pool = _ThreadPool(jobs)
    threads = [threading.Thread(target=_run_jobs, args=(pool, do)) for _ in range(pool_size())]
    with _torch_threads_restored():
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(TICK_SECONDS)
                    tick()
        except BaseException as error:
            pool.stop(error, CALLER)
            raise
        finally:
            for thread in threads:
                if thread.ident:
                    thread.join()
    if pool.error:
        raise pool.error
    tick()


class SharedWork(Generic[T]):
    """Parts of a computation that several threads need: each thread computes parts that no other has started."""

    def __init__(self, parts: Sequence[Callable[[], T]]) -> None:
        self._waiting = list(enumerate(parts))[::-1]
        self._results: dict[int, T] = {}
        self._count = len(parts)
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def results(self) -> list[T]:
        """Compute the parts that no thread has started, wait for the rest, and return the results in order.

        The first error of a part ends the work, and every thread raises it.
        """
        while part := self._take():
            number, work = part
            try:
                result = work()
            except BaseException as error:
                self._update(partial(setattr, self, "_error", error))
                raise
            self._update(partial(self._results.__setitem__, number, result))
        with self._changed:
            self._changed.wait_for(lambda: self._error or len(self._results) == self._count)
        if self._error:
            raise self._error
        return [self._results[number] for number in range(self._count)]

    def _take(self) -> tuple[int, Callable[[], T]] | None:
        with self._changed:
            return self._waiting.pop() if self._waiting and not self._error else None

    def _update(self, change: Callable[[], object]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()


class _ThreadPool(Generic[T]):
    def __init__(self, jobs: Iterable[T]) -> None:
        self._jobs = enumerate(jobs)
        self._lock = threading.Lock()
        self._failed = 0
        self.error: BaseException | None = None

    def next_job(self) -> tuple[int, T] | None:
        """Return the next job and its number; None after the last one or an error."""
        with self._lock:
            return next(self._jobs, None) if self.error is None else None

    def stop(self, error: BaseException, number: int) -> None:
        """Start no more jobs. Keep the error of the lowest number, so that the same jobs always fail the same way."""
        with self._lock:
            if self.error is None or number < self._failed:
                self.error, self._failed = error, number


def _run_jobs(pool: _ThreadPool[T], do: Callable[[T], None]) -> None:
    import torch

    torch.set_num_threads(1)
    with recycling(BufferPool()):
        number = NOT_STARTED
        try:
            while numbered_job := pool.next_job():
                number, job = numbered_job
                do(job)
                number = NOT_STARTED
        except BaseException as error:
            pool.stop(error, number)


@contextmanager
def _torch_threads_restored() -> Generator[None, None, None]:
    """Restore the process's number of torch threads, which each thread of the pool sets to one."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
