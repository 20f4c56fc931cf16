"""An interrupt ends a step even if the error that Dagster raises for it is lost."""

import os
import signal
import threading
from contextlib import suppress

import dagster as dg
import pytest
from dagster._core.errors import raise_execution_interrupts

from qwen_pipeline.defs.interrupts import interrupts_kept
from qwen_pipeline.defs.resources import StepRunner
from qwen_pipeline.progress import Progress

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def swallowed(number: int) -> None:
    """Send a signal to this process, and lose the error that its handler raises, as a finalizer would."""
    with suppress(dg.DagsterExecutionInterruptedError):
        os.kill(os.getpid(), number)


@SIGNALS
def test_a_swallowed_interrupt_is_raised_at_the_next_progress(number: int) -> None:
    observed: list[Progress] = []
    with raise_execution_interrupts(), StepRunner(observe=observed.append).run(dg.build_asset_context()) as observe:
        observe(Progress(task="merge", done=0, total=2))
        swallowed(number)
        with pytest.raises(dg.DagsterExecutionInterruptedError):
            observe(Progress(task="merge", done=1, total=2))
    assert [progress.done for progress in observed] == [0]


@SIGNALS
def test_a_swallowed_interrupt_is_raised_at_the_end_of_a_step(number: int) -> None:
    with (
        raise_execution_interrupts(),
        pytest.raises(dg.DagsterExecutionInterruptedError),
        StepRunner().run(dg.build_asset_context()),
    ):
        swallowed(number)


def test_other_signals_and_earlier_ones_are_no_interrupts() -> None:
    handler = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with raise_execution_interrupts():
            swallowed(signal.SIGTERM)
            with interrupts_kept() as require_no_interrupt:
                os.kill(os.getpid(), signal.SIGUSR1)
                require_no_interrupt()
    finally:
        signal.signal(signal.SIGUSR1, handler)
    assert signal.set_wakeup_fd(-1) == -1, "the descriptor is given back"


def test_another_thread_has_no_interrupts() -> None:
    ends: list[bool] = []

    def work() -> None:
        with interrupts_kept() as require_no_interrupt:
            require_no_interrupt()
        ends.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ends == [True]
