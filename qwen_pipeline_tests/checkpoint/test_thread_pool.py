"""Jobs on several threads fail as they would one after the other, and leave no thread behind."""

import threading
from collections.abc import Iterator

import pytest
import torch

from qwen_pipeline.checkpoint.thread_pool import map_ordered, pool_size


def threads_left() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if "_run_jobs" in thread.name}


def test_the_error_of_the_first_job_counts_even_if_a_later_job_fails_first() -> None:
    later_failed = threading.Event()

    def do(number: int) -> None:
        if number == 1:
            later_failed.set()
        elif number == 0:
            assert later_failed.wait(10)
        raise ValueError(number)

    with pytest.raises(ValueError, match="0"):
        map_ordered(range(2), do)


def test_no_job_starts_after_an_error() -> None:
    taken: list[int] = []

    def jobs() -> Iterator[int]:
        for number in range(10_000):
            taken.append(number)
            yield number

    def do(number: int) -> None:
        raise ValueError(number)

    with pytest.raises(ValueError, match="0"):
        map_ordered(jobs(), do)
    assert len(taken) <= pool_size()


def test_an_error_of_the_iterator_is_raised() -> None:
    def jobs() -> Iterator[int]:
        yield 0
        raise ValueError("no next job")

    with pytest.raises(ValueError, match="no next job"):
        map_ordered(jobs(), lambda _: None)


def test_the_caller_can_cancel() -> None:
    """As Ctrl-C or a deadline would: started jobs end, no more jobs start, and no thread is left."""
    stop, done = threading.Event(), list[int]()

    def do(number: int) -> None:
        assert stop.wait(10)
        done.append(number)

    def tick() -> None:
        stop.set()
        raise KeyboardInterrupt

    def jobs() -> Iterator[int]:
        number = 0
        while True:
            yield (number := number + 1)

    with pytest.raises(KeyboardInterrupt):
        map_ordered(jobs(), do, tick=tick)
    assert not threads_left()


def test_every_job_runs_once() -> None:
    done: list[int] = []
    map_ordered(range(100), done.append)
    assert sorted(done) == list(range(100))


def test_the_number_of_torch_threads_is_restored() -> None:
    before = torch.get_num_threads()
    map_ordered(range(3), lambda _: None)
    assert torch.get_num_threads() == before
