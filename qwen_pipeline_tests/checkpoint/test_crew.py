"""Jobs of a crew fail as they would one after the other."""

import threading

import pytest

from qwen_pipeline.checkpoint.crew import work_in_order


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


def test_every_job_is_done_once() -> None:
    done: list[int] = []
    work_in_order(range(100), done.append)
    assert sorted(done) == list(range(100))
