"""Jobs of a crew fail as they would one after the other, and leave no thread behind."""

import threading
from collections.abc import Iterator

import pytest
import torch

from qwen_pipeline.checkpoint.thread_pool import map_ordered, pool_size


def threads_left() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if "_serve" in thread.name}


def test_the_oldest_fault_counts_whoever_fails_first() -> None:
    younger_failed = threading.Event()

    def do(number: int) -> None:
        if number == 1:
            younger_failed.set()
        elif number == 0:
            assert younger_failed.wait(10)
        raise ValueError(number)

    with pytest.raises(ValueError, match="0"):
        map_ordered(range(2), do)


def test_a_fault_begins_nothing_more() -> None:
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


def test_a_fault_in_finding_the_next_job_is_raised() -> None:
    def jobs() -> Iterator[int]:
        yield 0
        raise ValueError("no next job")

    with pytest.raises(ValueError, match="no next job"):
        map_ordered(jobs(), lambda _: None)


def test_whoever_set_the_crew_to_work_can_cancel_it() -> None:
    """As Ctrl-C or a deadline would: what is begun ends, nothing more begins, no thread is left."""
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


def test_every_job_is_done_once() -> None:
    done: list[int] = []
    map_ordered(range(100), done.append)
    assert sorted(done) == list(range(100))


def test_the_number_of_torch_threads_is_left_as_it_was() -> None:
    before = torch.get_num_threads()
    map_ordered(range(3), lambda _: None)
    assert torch.get_num_threads() == before
