"""The end of a program: all is said and on disk, and to take an interpreter with torch apart takes a second or two."""

import atexit
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def fast_exit() -> Generator[None, None, None]:
    """End the process where the body exits, after its threads and whatever is registered for the exit.

    A body that returns or raises anything but ``SystemExit`` with a number ends as ever.
    """
    codes: list[int] = []
    atexit.register(lambda: codes and _leave(codes[0]))  # the first to be registered is the last to be called
    try:
        yield
    except SystemExit as leaving:
        codes += [leaving.code] if isinstance(leaving.code, int) else []
        raise


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
