"""What the solver says about each module, read from the table that it writes."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any

from qwen_pipeline.qwen.linears import Linear

NOT_SOLVED = 999_999_999
"""The loss that GPTQModel 7 logs for a module that it only rounded to nearest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleLoss:
    """One row of a quantization log.

    Attributes:
        loss: Squared output error per calibration token, as the solver estimates it; None where it is not finite or
            where the module was only rounded.
        samples: Calibration tokens that reached the module.
        damp: Share of the mean Hessian diagonal that was added, raised above the spec's where that failed.
        rounded: Whether the solver gave up and rounded to nearest.
        seconds: What the solver took. This and what follows is None where the engine does not say it.
        gpu_peak_bytes: Highest GPU memory since the layer began.
        host_peak_bytes: Highest resident memory of the engine so far.
        zero_groups: Groups of one output whose weights are all zero.
        saturated_groups: Groups of one output with a quarter of their codes or more at the ends of the grid.
    """

    module: str
    loss: float | None
    samples: int
    damp: float
    rounded: bool
    seconds: float | None = None
    gpu_peak_bytes: int | None = None
    host_peak_bytes: int | None = None
    zero_groups: int | None = None
    saturated_groups: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_losses(quant_log: Path, linears: Sequence[Linear]) -> list[ModuleLoss]:
    """Read ``layer,module,loss,samples,damp``; rows come in the order of ``linears``, absent ones are left out.

    Columns beyond these may be missing. Losses that are words (``rtn fallback``) or
    :data:`NOT_SOLVED` mean rounding.
    """
    with quant_log.open(newline="") as file:
        rows = {(int(row["layer"]), row["module"]): row for row in csv.DictReader(file)}
    losses: list[ModuleLoss] = []
    for linear in linears:
        if row := rows.get((linear.layer, linear.kind)):
            loss = _number(row["loss"])
            rounded = loss >= NOT_SOLVED
            losses.append(
                ModuleLoss(
                    module=linear.module,
                    loss=loss if isfinite(loss) and not rounded else None,
                    samples=int(row["samples"]),
                    damp=float(row["damp"]),
                    rounded=rounded,
                    seconds=float(row["time"]) if "time" in row else None,
                    **{name: int(row[name]) for name in _FIGURES if name in row},
                )
            )
    return losses


def _number(loss: str) -> float:
    """Read a loss; a word in its place is as bad as can be."""
    try:
        return float(loss)
    except ValueError:
        return inf


_FIGURES = ("gpu_peak_bytes", "host_peak_bytes", "zero_groups", "saturated_groups")
