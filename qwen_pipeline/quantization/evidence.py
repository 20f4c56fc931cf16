"""Per-module evidence of a quantization: figures of the solver's log and counts of the codes, stored as a table.

The table is one of the logs of a quantized checkpoint: it holds times and memory, so it is not part of the content.
"""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import exp, log
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.checkpoint.store.canonical import LOGS
from qwen_pipeline.checkpoint.thread_pool import map_ordered
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.linears import Linear
from qwen_pipeline.transforms.codes.gptq import gptq_format

if TYPE_CHECKING:
    import pandas as pd

EVIDENCE, PLOT = f"{LOGS}evidence.csv", f"{LOGS}evidence.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleEvidence:
    """Figures of one quantized module.

    Attributes:
        module: Name of the module in the checkpoint.
        kind: Path of the module in its decoder layer.
        loss: Squared output error per calibration token, as estimated by the solver; None if it is not finite or the
            module was only rounded.
        damp: Share of the mean Hessian diagonal that was added; above the spec's value if that was not enough.
        tokens: Calibration tokens that reached the module.
        rounded: Whether the solver gave up and rounded to nearest.
        seconds: Duration of solving and packing. This and the fields below are None if they are not known.
        gpu_peak_bytes: Highest GPU memory since the layer began.
        host_peak_bytes: Highest resident memory since the quantizer's process began.
        groups: Groups of weights: outputs times groups of inputs.
        zero_groups: Groups whose weights are all zero.
        saturated_groups: Groups with at least a quarter of their codes at the ends of the grid.
        gptq_error: What GPTQ alone would add to the outputs' error, as a share of their squares, estimated on some
            outputs (:mod:`qwen_pipeline.quantization.steps.step_errors`). This and those below are None for the recipe
            ``gptq``, for most experts, and in some layers if there are many.
        corrected_error: That of GPTQ with corrected targets.
        searched_error: That of the codes before rounding is learned, whose scales were searched for.
    """

    module: str
    layer: int
    kind: str
    loss: float | None
    damp: float
    tokens: int
    rounded: bool
    seconds: float | None = None
    gpu_peak_bytes: int | None = None
    host_peak_bytes: int | None = None
    groups: int | None = None
    zero_groups: int | None = None
    saturated_groups: int | None = None
    gptq_error: float | None = None
    corrected_error: float | None = None
    searched_error: float | None = None


STEP_ERRORS = ("gptq_error", "corrected_error", "searched_error")
"""The fields for the errors after each step of a recipe."""


def gather_evidence(
    output: Checkpoint, linears: Sequence[Linear], losses: Sequence[ModuleEvidence]
) -> list[ModuleEvidence]:
    """Add counts of the codes to the rows of the solver's log; modules that lack a row or codes are left out."""
    from qwen_pipeline.quantization.solver import zero_and_saturated_groups

    form, logged = gptq_format(output.config), {row.module: row for row in losses}
    gathered: dict[str, ModuleEvidence] = {}

    def count_groups(linear: Linear) -> None:
        row = logged[linear.module]
        zero, saturated = row.zero_groups, row.saturated_groups
        if zero is None or saturated is None:
            zero, saturated = zero_and_saturated_groups(form.load(output, linear.module))
        per_group = form.of(output, linear.module).inputs_per_group(linear.in_features)
        groups = linear.out_features * linear.in_features // per_group
        gathered[linear.module] = replace(row, groups=groups, zero_groups=zero, saturated_groups=saturated)

    known = [linear for linear in linears if linear.module in logged and f"{linear.module}.qweight" in output]
    map_ordered(known, count_groups)
    return [gathered[linear.module] for linear in known]


def summarize(rows: Sequence[ModuleEvidence]) -> dict[str, Any]:
    """Return the figures of the whole model, as JSON values."""
    losses = [row.loss for row in rows if row.loss]
    return {
        "modules": len(rows),
        "fallbacks": sum(row.rounded for row in rows),
        "most_damp": max((row.damp for row in rows if not row.rounded), default=None),
        "mean_loss": _geometric_mean(losses) if losses else None,
        "groups": sum(row.groups or 0 for row in rows),
        "zero_groups": sum(row.zero_groups or 0 for row in rows),
        "saturated_groups": sum(row.saturated_groups or 0 for row in rows),
        "fewest_tokens": min((row.tokens for row in rows), default=None),
        "solver_seconds": round(sum(row.seconds or 0 for row in rows), 3),
        "gpu_peak_bytes": max((row.gpu_peak_bytes or 0 for row in rows), default=0),
        "host_peak_bytes": max((row.host_peak_bytes or 0 for row in rows), default=0),
    }


def write_evidence(rows: Iterable[ModuleEvidence], path: Path) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(_COLUMNS))
        table.writeheader()
        table.writerows(asdict(row) for row in rows)


def load_evidence(root: Path) -> list[ModuleEvidence]:
    """Read the table of a finished quantized checkpoint.

    Raises:
        InputRefused: There is no table: the directory is not a quantized checkpoint, or an earlier version wrote it.
    """
    file = root / EVIDENCE
    if not file.is_file():
        raise InputRefused(
            f"{root} has no {EVIDENCE}.", remedy="Pass a directory that this version of `quantize` finished."
        )
    with file.open(newline="") as lines:
        return [
            ModuleEvidence(**{name: _COLUMNS[name][0](text) for name, text in row.items()})
            for row in csv.DictReader(lines)
        ]


def evidence_frame(root: Path) -> "pd.DataFrame":
    """Return the table of a finished quantized checkpoint as a data frame: see :func:`to_frame`.

    Raises:
        InputRefused: There is no table: the directory is not a quantized checkpoint, or an earlier version wrote it.
    """
    return to_frame(load_evidence(root))


def to_frame(rows: Iterable[ModuleEvidence]) -> "pd.DataFrame":
    """Return a data frame with a typed column per field of :class:`ModuleEvidence`, indexed by ``module``.

    An unknown float is NaN, an unknown integer is ``pandas.NA``.
    """
    import pandas as pd

    frame = pd.DataFrame([asdict(row) for row in rows], columns=list(_COLUMNS))
    return frame.astype({name: dtype for name, (_, dtype) in _COLUMNS.items()}).set_index("module")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceComparison:
    """The losses of one quantized checkpoint relative to those of another.

    Attributes:
        modules: Number of modules with a loss in both.
        mean_ratio: Geometric mean of loss now / loss before.
        worst: Module -> ratio, in order of descending ratio.
    """

    modules: int
    mean_ratio: float | None
    worst: Mapping[str, float]

    def sentence(self, before: str) -> str:
        """Describe the losses relative to those of ``before``."""
        if self.mean_ratio is None:
            return f"No module has a loss both here and in {before}."
        return f"Losses of {self.modules} modules are {self.mean_ratio:.3f} times those of {before} (geometric mean)."


def compare_evidence(
    before: Sequence[ModuleEvidence], now: Sequence[ModuleEvidence], *, worst: int = 10
) -> EvidenceComparison:
    """Compare the losses of modules that are in both."""
    earlier = {row.module: row.loss for row in before}
    ratios = {row.module: row.loss / old for row in now if row.loss and (old := earlier.get(row.module))}
    descending = sorted(ratios.items(), key=lambda item: -item[1])
    return EvidenceComparison(
        modules=len(ratios),
        mean_ratio=_geometric_mean(list(ratios.values())) if ratios else None,
        worst=dict(descending[:worst]),
    )


def _geometric_mean(values: Sequence[float]) -> float:
    return exp(sum(map(log, values)) / len(values))


def _optional(read: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: read(text) if text else None


_COLUMNS: Mapping[str, tuple[Callable[[str], Any], str]] = {
    "module": (str, "string"),
    "layer": (int, "int64"),
    "kind": (str, "string"),
    "loss": (_optional(float), "float64"),
    "damp": (float, "float64"),
    "tokens": (int, "int64"),
    "rounded": (lambda text: text == "True", "bool"),
    "seconds": (_optional(float), "float64"),
    "gpu_peak_bytes": (_optional(int), "Int64"),
    "host_peak_bytes": (_optional(int), "Int64"),
    "groups": (_optional(int), "Int64"),
    "zero_groups": (_optional(int), "Int64"),
    "saturated_groups": (_optional(int), "Int64"),
    **{name: (_optional(float), "float64") for name in STEP_ERRORS},
}
"""Column of the table -> the function that reads its text, and its dtype in a data frame."""
