"""Exiting without the interpreter's own shutdown, which takes a second or two once torch is imported."""

import atexit
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def fast_exit() -> Generator[None, None, None]:
    """End the process when the body calls ``sys.exit`` with a number, after its threads and ``atexit`` functions.

    Otherwise, the body returns or raises as usual.
    """
    codes: list[int] = []
    atexit.register(lambda: codes and _exit(codes[0]))  # registered first, and so called last
    try:
        yield
    except SystemExit as ending:
        codes += [ending.code] if isinstance(ending.code, int) else []
        raise


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
