"""The faults this package can name.

Every message says what is wrong, with names and values, and what to do about it. The class decides the exit code of the
command line and whether Dagster may retry.
"""

from collections.abc import Sequence


class PipelineError(Exception):
    """Base of every fault; ``exit_code`` is what the command line ends with.

    Args:
        what: What is wrong: the name of the thing, the value expected and the value found.
        remedy: What the reader can do about it, as an instruction.
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
    """The work was done, and what came out is not good enough to go on."""


class InputRefused(PipelineError):
    """The input or the request cannot be served; nothing was written."""

    exit_code = 2


class CheckpointRefused(InputRefused):
    """A directory does not hold a checkpoint that can be read safely and completely."""


class AdapterRefused(InputRefused):
    """An adapter cannot be merged exactly into this base."""


class QuantizedInputRefused(InputRefused):
    """A stage that needs full-precision weights was given quantized ones: the stages are in the wrong order."""


class DestinationRefused(InputRefused):
    """The output directory already holds something else."""


class EnvironmentFault(PipelineError):
    """The machine, not the input, is at fault: disk, memory, GPU, an engine that is not installed."""

    exit_code = 3
    retryable = True


class DestinationLocked(EnvironmentFault):
    """Another process is writing the same output."""


class EngineFault(EnvironmentFault):
    """A worker process ended without a result."""

    retryable = False


def listed(items: Sequence[str], *, limit: int = 6) -> str:
    """Return the first items and how many more there are, as messages name them."""
    rest = f"; and {len(items) - limit} more" if len(items) > limit else ""
    return "; ".join(items[:limit]) + rest
