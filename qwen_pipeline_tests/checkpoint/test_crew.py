"""Jobs of a crew fail as they would one after the other, wait only for older ones, and leave no thread behind."""

import threading
from collections.abc import Iterator

import pytest
import torch

from qwen_pipeline.checkpoint.crew import crew_size, take_turn, tell_waiting, work_in_order


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
        work_in_order(range(2), do)


def test_an_older_job_takes_its_turn_and_fails_though_a_younger_one_failed_before() -> None:
    younger: list[threading.Thread] = []
    younger_began = threading.Event()

    def do(number: int) -> None:
        if number == 1:
            younger.append(threading.current_thread())
            younger_began.set()
            raise ValueError("younger")
        assert younger_began.wait(10)
        younger[0].join(10)
        assert take_turn(lambda: True, lambda: True)
        raise ValueError("older")

    with pytest.raises(ValueError, match="older"):
        work_in_order(range(2), do)


def test_a_job_that_waits_for_a_failed_one_ends() -> None:
    def do(number: int) -> None:
        if number == 0:
            raise ValueError(number)
        take_turn(lambda: False, lambda: False)

    with pytest.raises(ValueError, match="0"):
        work_in_order(range(2), do)
    assert not threads_left()


def test_the_oldest_job_waits_for_nothing() -> None:
    claimed: list[bool] = []
    work_in_order(range(20), lambda _: claimed.append(take_turn(lambda: False, lambda: True)))
    assert claimed == [True] * 20


def test_a_job_waits_until_an_older_one_told_it() -> None:
    order: list[int] = []

    def do(number: int) -> None:
        take_turn(lambda: len(order) == number, lambda: True)
        tell_waiting(lambda: order.append(number))

    work_in_order(range(50), do)
    assert order == list(range(50))


def test_a_fault_begins_nothing_more() -> None:
    taken: list[int] = []

    def jobs() -> Iterator[int]:
        for number in range(10_000):
            taken.append(number)
            yield number

    def do(number: int) -> None:
        raise ValueError(number)

    with pytest.raises(ValueError, match="0"):
        work_in_order(jobs(), do)
    assert len(taken) <= crew_size()


def test_a_fault_in_finding_the_next_job_is_raised() -> None:
    def jobs() -> Iterator[int]:
        yield 0
        raise ValueError("no next job")

    with pytest.raises(ValueError, match="no next job"):
        work_in_order(jobs(), lambda _: None)


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
        work_in_order(jobs(), do, tick=tick)
    assert not threads_left()


def test_every_job_is_done_once() -> None:
    done: list[int] = []
    work_in_order(range(100), done.append)
    assert sorted(done) == list(range(100))


def test_the_number_of_torch_threads_is_left_as_it_was() -> None:
    before = torch.get_num_threads()
    work_in_order(range(3), lambda _: None)
    assert torch.get_num_threads() == before
