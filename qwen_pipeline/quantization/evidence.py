"""What is known of each quantized module, from the solver's log and from the codes themselves, kept as a table.

The table lies among the logs of a quantized checkpoint: it tells times and memory, so it is no part of the content.
"""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import exp, log
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.checkpoint.manifest import LOGS
from qwen_pipeline.checkpoint.thread_pool import map_ordered
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.quantization.losses import ModuleLoss
from qwen_pipeline.qwen.linears import Linear
from qwen_pipeline.transforms.codes.gptq import gptq_format

EVIDENCE, PLOT = f"{LOGS}evidence.csv", f"{LOGS}evidence.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One row.

    Attributes:
        kind: Path of the module in its layer.
        loss: See :class:`~qwen_pipeline.quantization.losses.ModuleLoss`, as for the fields up to ``host_peak_bytes``.
        groups: Groups of weights, outputs times groups of inputs.
        zero_groups: Groups whose weights are all zero.
        saturated_groups: Groups with a quarter of their codes or more at the ends of the grid.
    """

    module: str
    layer: int
    kind: str
    loss: float | None
    damp: float
    tokens: int
    rounded: bool
    seconds: float | None
    gpu_peak_bytes: int | None
    host_peak_bytes: int | None
    groups: int
    zero_groups: int
    saturated_groups: int


def gather_evidence(output: Checkpoint, linears: Sequence[Linear], losses: Sequence[ModuleLoss]) -> list[Evidence]:
    """Join the log with what the codes show; modules without either are left out."""
    from qwen_pipeline.quantization.solver import odd_groups

    form, told = gptq_format(output.config), {loss.module: loss for loss in losses}
    found: dict[str, Evidence] = {}

    def look(linear: Linear) -> None:
        loss = told[linear.module]
        zero, saturated = loss.zero_groups, loss.saturated_groups
        if zero is None or saturated is None:
            zero, saturated = odd_groups(form.load(output, linear.module))
        found[linear.module] = Evidence(
            module=linear.module,
            layer=linear.layer,
            kind=linear.kind,
            loss=loss.loss,
            damp=loss.damp,
            tokens=loss.samples,
            rounded=loss.rounded,
            seconds=loss.seconds,
            gpu_peak_bytes=loss.gpu_peak_bytes,
            host_peak_bytes=loss.host_peak_bytes,
            groups=linear.out_features * linear.in_features // form.inputs_per_group(linear.in_features),
            zero_groups=zero,
            saturated_groups=saturated,
        )

    known = [at for at in linears if at.module in told and f"{at.module}.qweight" in output]
    map_ordered(known, look)
    return [found[at.module] for at in known]


def summarize(rows: Sequence[Evidence]) -> dict[str, Any]:
    """Return the figures of the whole model, as JSON values."""
    losses = [row.loss for row in rows if row.loss]
    return {
        "modules": len(rows),
        "fallbacks": sum(row.rounded for row in rows),
        "most_damp": max((row.damp for row in rows if not row.rounded), default=None),
        "mean_loss": _geometric_mean(losses) if losses else None,
        "groups": sum(row.groups for row in rows),
        "zero_groups": sum(row.zero_groups for row in rows),
        "saturated_groups": sum(row.saturated_groups for row in rows),
        "fewest_tokens": min((row.tokens for row in rows), default=None),
        "solver_seconds": round(sum(row.seconds or 0 for row in rows), 3),
        "gpu_peak_bytes": max((row.gpu_peak_bytes or 0 for row in rows), default=0),
        "host_peak_bytes": max((row.host_peak_bytes or 0 for row in rows), default=0),
    }


def write_evidence(rows: Iterable[Evidence], path: Path) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Evidence)])
        table.writeheader()
        table.writerows(asdict(row) for row in rows)


def load_evidence(root: Path) -> list[Evidence]:
    """Read the table of a finished quantized checkpoint.

    Raises:
        InputRefused: It has none: it is no quantized checkpoint, or an earlier version made it.
    """
    file = root / EVIDENCE
    if not file.is_file():
        raise InputRefused(
            f"{root} has no {EVIDENCE}.", remedy="Name a directory that this version of `quantize` finished."
        )
    with file.open(newline="") as lines:
        return [Evidence(**{name: _READ[name](text) for name, text in row.items()}) for row in csv.DictReader(lines)]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceComparison:
    """How the losses of one quantized checkpoint are to those of another.

    Attributes:
        modules: Modules that both have a loss of.
        mean_ratio: Geometric mean of loss now / loss before.
        worst: Modules by falling ratio -> the ratio.
    """

    modules: int
    mean_ratio: float | None
    worst: Mapping[str, float]

    def sentence(self, before: str) -> str:
        """Say how losses are to those of ``before``."""
        if self.mean_ratio is None:
            return f"No module has a loss here and in {before}."
        return f"Losses of {self.modules} modules are {self.mean_ratio:.3f} times those of {before} (geometric mean)."


def compare_evidence(before: Sequence[Evidence], now: Sequence[Evidence], *, worst: int = 10) -> EvidenceComparison:
    """Compare the losses of modules that are in both."""
    earlier = {row.module: row.loss for row in before}
    ratios = {row.module: row.loss / old for row in now if row.loss and (old := earlier.get(row.module))}
    falling = sorted(ratios.items(), key=lambda item: -item[1])
    return EvidenceComparison(
        modules=len(ratios),
        mean_ratio=_geometric_mean(list(ratios.values())) if ratios else None,
        worst=dict(falling[:worst]),
    )


def _geometric_mean(values: Sequence[float]) -> float:
    return exp(sum(map(log, values)) / len(values))


def _optional(read: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: read(text) if text else None


_READ: Mapping[str, Callable[[str], Any]] = {
    "module": str,
    "layer": int,
    "kind": str,
    "loss": _optional(float),
    "damp": float,
    "tokens": int,
    "rounded": lambda text: text == "True",
    "seconds": _optional(float),
    "gpu_peak_bytes": _optional(int),
    "host_peak_bytes": _optional(int),
    "groups": int,
    "zero_groups": int,
    "saturated_groups": int,
}
