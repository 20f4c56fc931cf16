"""What quantization did to each weight, computed from its codes a block of rows at a time."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import inf

import torch
from torch.linalg import vector_norm

from qwen_pipeline.checkpoint.digest import block_ranges
from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.qwen.linears import Linear, load_weight
from qwen_pipeline.transforms.gptq_codes import PackedLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightError:
    """``relative`` is ``||W - Wq|| / ||W||`` in the Frobenius norm; 0 for a weight that is zero throughout."""

    module: str
    layer: int
    kind: str
    relative: float


@dataclass(frozen=True, slots=True)
class ZeroLines:
    """Which rows [O] and columns [I] of a weight are zero throughout, bool."""

    rows: torch.Tensor
    columns: torch.Tensor

    @classmethod
    def of_shape(cls, out_features: int, in_features: int) -> "ZeroLines":
        return cls(torch.ones(out_features, dtype=torch.bool), torch.ones(in_features, dtype=torch.bool))

    def see(self, start: int, block_OI: torch.Tensor) -> None:
        """Take the rows from ``start`` on into account."""
        self.rows[start : start + len(block_OI)] = vector_norm(block_OI, ord=inf, dim=1) == 0
        self.columns.logical_and_(vector_norm(block_OI, ord=inf, dim=0) == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A weight before (full precision) and after (its codes)."""

    error: WeightError
    before: ZeroLines
    after: ZeroLines


def compare_weight(source: Checkpoint, linear: Linear, packed: PackedLinear) -> Comparison:
    """Compare a weight of ``source`` with what its codes stand for.

    Norms are float32 within a block of rows and float64 over blocks.
    """
    spec = TensorSpec(dtype=source[linear.tensor].dtype, shape=(linear.out_features, linear.in_features))
    before, after = (ZeroLines.of_shape(linear.out_features, linear.in_features) for _ in range(2))
    squared_error = squared_norm = 0.0
    for start, stop in block_ranges(spec):
        w_OI, wq_OI = load_weight(source, linear, slice(start, stop)).float(), packed.weight_rows(start, stop)
        before.see(start, w_OI)
        after.see(start, wq_OI)
        squared_error += vector_norm(w_OI - wq_OI).item() ** 2
        squared_norm += vector_norm(w_OI).item() ** 2
    relative = (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0
    error = WeightError(module=linear.module, layer=linear.layer, kind=linear.kind, relative=relative)
    return Comparison(error=error, before=before, after=after)


@dataclass(slots=True)
class PaddingFindings:
    """Padded channels over all layers, and a sentence for each weight that does not keep them zero."""

    channels: int = 0
    audible: list[str] = field(default_factory=list[str])


def check_padding(comparisons: Mapping[tuple[int, str], Comparison], layers: Collection[int]) -> PaddingFindings:
    """Check that the channels that padding added are exactly zero after quantization too.

    They are recognized by their weights: a zero row in gate and up, and a zero column in down.

    Args:
        comparisons: (layer, kind) -> comparison; layers that lack one of the three are passed over.
        layers: The layers to look at.
    """
    findings = PaddingFindings()
    for layer in layers:
        gate, up, down = (comparisons.get((layer, f"mlp.{name}_proj")) for name in ("gate", "up", "down"))
        if not (gate and up and down):
            continue
        padded = gate.before.rows & up.before.rows & down.before.columns
        findings.channels += int(padded.sum())
        for weight, is_zero in ((gate, gate.after.rows), (up, up.after.rows), (down, down.after.columns)):
            if audible := (padded & ~is_zero).nonzero().flatten().tolist():
                findings.audible.append(
                    f"{weight.error.module}: {len(audible)} of {int(padded.sum())} padded channels are not zero, the"
                    f" first is {audible[0]}."
                )
    return findings
