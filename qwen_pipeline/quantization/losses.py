"""The solver's log, ``quant_log.csv``: a row of figures per module, written by every quantizer."""

import csv
from collections.abc import Sequence
from math import inf, isfinite
from pathlib import Path
from typing import Any

from qwen_pipeline.quantization.evidence import STEP_ERRORS, ModuleEvidence
from qwen_pipeline.qwen.linears import Linear

NOT_SOLVED = 999_999_999
"""The loss that GPTQModel 7 logs for a module that it only rounded to nearest."""

_COUNTS = ("gpu_peak_bytes", "host_peak_bytes", "zero_groups", "saturated_groups")
LOG_COLUMNS: tuple[str, ...] = ("layer", "module", "loss", "samples", "damp", "time", *_COUNTS, *STEP_ERRORS)


def log_row(row: ModuleEvidence) -> dict[str, Any]:
    """Return a row of the log, by :data:`LOG_COLUMNS`; its ``module`` is the path in the decoder layer."""
    figures = (row.layer, row.kind, row.loss, row.tokens, row.damp, row.seconds)
    others = (getattr(row, name) for name in (*_COUNTS, *STEP_ERRORS))
    return dict(zip(LOG_COLUMNS, (*figures, *others), strict=True))


def loss_json(row: ModuleEvidence) -> dict[str, Any]:
    """Return an entry of ``losses`` in the manifest's result, as JSON values; errors that are unknown are left out."""
    return {
        "module": row.module,
        "loss": row.loss,
        "samples": row.tokens,
        "damp": row.damp,
        "rounded": row.rounded,
        "seconds": row.seconds,
        **{name: getattr(row, name) for name in _COUNTS},
        **{name: error for name in STEP_ERRORS if (error := getattr(row, name)) is not None},
    }


def read_losses(quant_log: Path, linears: Sequence[Linear]) -> list[ModuleEvidence]:
    """Read the log; rows are in the order of ``linears``, and modules without a row are left out.

    The columns from ``time`` on may be missing. A loss that is a word (``rtn fallback``) or at least
    :data:`NOT_SOLVED` means that the module was rounded to nearest.
    """
    with quant_log.open(newline="") as file:
        rows = {(int(row["layer"]), row["module"]): row for row in csv.DictReader(file)}
    return [_read_row(row, linear) for linear in linears if (row := rows.get((linear.layer, linear.kind))) is not None]


def _read_row(row: dict[str, str], linear: Linear) -> ModuleEvidence:
    loss = _read_loss(row["loss"])
    rounded = loss >= NOT_SOLVED
    errors: dict[str, Any] = {name: float(row[name]) for name in STEP_ERRORS if row.get(name)}
    return ModuleEvidence(
        module=linear.module,
        layer=linear.layer,
        kind=linear.kind,
        loss=loss if isfinite(loss) and not rounded else None,
        damp=float(row["damp"]),
        tokens=int(row["samples"]),
        rounded=rounded,
        seconds=float(row["time"]) if "time" in row else None,
        **{name: int(row[name]) for name in _COUNTS if name in row},
        **errors,
    )


def _read_loss(loss: str) -> float:
    """Read a loss; a word means that the module was rounded, so its loss is infinite."""
    try:
        return float(loss)
    except ValueError:
        return inf
