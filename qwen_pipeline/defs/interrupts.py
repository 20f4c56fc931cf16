"""Interrupts of a step that a library swallowed.

Dagster raises :class:`DagsterExecutionInterruptedError` in its signal handler, wherever the main thread happens to be.
If that is a finalizer, a callback from C or a handler of all exceptions, the error is lost, and the run goes on to its
end. The interpreter also writes the number of each signal to a file descriptor, which cannot be lost.
"""

import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

import dagster as dg

_INTERRUPTS = frozenset({signal.SIGINT, signal.SIGTERM})


@contextmanager
def interrupts_kept() -> Generator[Callable[[], None]]:
    """Yield a function that raises the interrupt if a signal has arrived since and its error was lost.

    In another thread than the main one, which receives no signals, the function does nothing.

    Raises:
        DagsterExecutionInterruptedError: From the function: such a signal has arrived.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def require_no_interrupt() -> None:
        if threading.current_thread() is threading.main_thread() and _INTERRUPTS & set(_read(reader)):
            raise dg.DagsterExecutionInterruptedError

    try:
        yield require_no_interrupt
    finally:
        signal.set_wakeup_fd(previous)
        os.close(reader)
        os.close(writer)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except BlockingIOError:
        return b""
