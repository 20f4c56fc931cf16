"""How a stage tells whoever watches how far it is: one event type for the terminal and for Dagster's log."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Unit = Literal["bytes", "layers", "modules", "tokens", "windows", "steps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """``done`` of ``total`` units of one task, with an optional remark worth a line in a log.

    ``unit="bytes"`` counts bytes moved; every other unit counts things.
    """

    task: str
    done: int
    total: int
    unit: Unit = "steps"
    remark: str = ""


Observe = Callable[[Progress], None]


def unobserved(_: Progress) -> None:
    """Watch nothing."""
