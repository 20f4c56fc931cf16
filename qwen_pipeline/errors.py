"""The exceptions of this package.

Every message says what is wrong, with names and values, and what to do about it. The class decides the exit code of the
command line, and whether Dagster may retry.
"""

from collections.abc import Sequence


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


def listed(items: Sequence[str], *, limit: int = 6) -> str:
    """Return the first items and the number of the rest, for a message."""
    rest = f"; and {len(items) - limit} more" if len(items) > limit else ""
    return "; ".join(items[:limit]) + rest
