"""The exceptions of this package.

Every message says what is wrong, with names and values, and what to do about it. The class decides the exit code of the
command line, and whether Dagster may retry.
"""

import errno
import os
from collections.abc import Mapping, Sequence


class PipelineError(Exception):
    """The base of every exception of this package.

    Args:
        what: The error: which object is wrong, the expected value and the value found.
        remedy: What the reader can do about it, as an instruction.

    Attributes:
        exit_code: The exit code of the command line.
        retryable: Whether the same work may succeed if it is repeated.
    """

    exit_code = 1
    retryable = False

    def __init__(self, what: str, *, remedy: str) -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}\nRemedy: {self.remedy}"


class CheckFailed(PipelineError):
    """The work was done, but its result fails a check that later stages rely on."""


class InputRefused(PipelineError):
    """The input or the request cannot be processed. Nothing was written."""

    exit_code = 2


class CheckpointRefused(InputRefused):
    """A directory does not hold a checkpoint that can be read safely and completely."""


class AdapterRefused(InputRefused):
    """An adapter cannot be merged exactly into this base."""


class QuantizedInputRefused(InputRefused):
    """A stage that needs full-precision weights was given quantized ones: the stages are in the wrong order."""


class DestinationRefused(InputRefused):
    """The output directory already has other contents."""


class EnvironmentFault(PipelineError):
    """The cause is the machine and not the input: disk, memory, GPU, or an environment that is not installed."""

    exit_code = 3
    retryable = True


class DestinationLocked(EnvironmentFault):
    """Another process is writing the same output."""


class WorkerFailed(EnvironmentFault):
    """A worker process ended without a result, or its library returned one that does not fit the input."""

    retryable = False


_AGAIN = "Then run again: finished work is kept."
_REMEDIES: Mapping[int, str] = {
    errno.ENOSPC: f"Free space on its disk. {_AGAIN}",
    errno.EDQUOT: f"Free space within the quota, or have it raised. {_AGAIN}",
    errno.EMFILE: f"Raise the limit of open files: ulimit -n 65536. {_AGAIN}",
    errno.ENFILE: f"Close other programs: the machine has no more open files. {_AGAIN}",
    errno.ENOMEM: f"Provide more memory, or close other programs. {_AGAIN}",
    errno.EIO: f"Check the disk, and the kernel's log for its errors. {_AGAIN}",
    errno.EROFS: f"Choose a place that can be written, or mount it for writing. {_AGAIN}",
    errno.EACCES: f"Give this user the permission to read inputs and write outputs. {_AGAIN}",
    errno.EPERM: f"Give this user the permission to read inputs and write outputs. {_AGAIN}",
    errno.ENOENT: f"Put back what was removed while it was used, or correct the path. {_AGAIN}",
    errno.ENAMETOOLONG: "Choose a shorter name.",
}


def machine_fault(error: OSError | MemoryError, *, place: object = None) -> EnvironmentFault:
    """Return an error of the operating system as one that names the file, the cause and what to do.

    Args:
        error: The error.
        place: Where it happened, if the error itself names no file.
    """
    if isinstance(error, MemoryError):
        return EnvironmentFault(f"Memory ran out: {str(error) or 'none is left'}.", remedy=_REMEDIES[errno.ENOMEM])
    names = " -> ".join(
        os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))
    )
    where, number = names or place or "A file", error.errno or 0
    reason = error.strerror or str(error) or type(error).__name__
    return EnvironmentFault(
        f"{where} cannot be used: {reason}.", remedy=_REMEDIES.get(number, f"Make sure that it can be used. {_AGAIN}")
    )


def listed(items: Sequence[str], *, limit: int = 6) -> str:
    """Return the first items and the number of the rest, for a message."""
    rest = f"; and {len(items) - limit} more" if len(items) > limit else ""
    return "; ".join(items[:limit]) + rest
