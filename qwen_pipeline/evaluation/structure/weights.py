"""Compare each quantized weight with the original, one block of rows at a time."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

import torch
from torch.linalg import vector_norm

from qwen_pipeline.checkpoint.digest import block_ranges
from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.evaluation.structure.groups import GroupFaults
from qwen_pipeline.qwen.linears import Linear, load_weight
from qwen_pipeline.transforms.codes.gptq import PackedLinear, unpack_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightError:
    """The error of a weight: ``relative`` is ``||W - Wq|| / ||W||`` in the Frobenius norm; 0 for a weight of zeros."""

    module: str
    layer: int
    kind: str
    relative: float


@dataclass(slots=True)
class RowsAndColumns:
    """Rows [O] and columns [I] of a weight that are zero or equal the previous one, bool.

    Attributes:
        zero_rows: Rows of zeros; ``zero_columns`` likewise.
        duplicate_rows: Rows that equal the previous row; ``duplicate_columns`` likewise.
    """

    zero_rows: torch.Tensor
    zero_columns: torch.Tensor
    duplicate_rows: torch.Tensor
    duplicate_columns: torch.Tensor
    _last_row: torch.Tensor | None = None

    @classmethod
    def of_shape(cls, out_features: int, in_features: int) -> "RowsAndColumns":
        duplicate_columns = torch.ones(in_features, dtype=torch.bool)
        duplicate_columns[:1] = False
        return cls(
            zero_rows=torch.ones(out_features, dtype=torch.bool),
            zero_columns=torch.ones(in_features, dtype=torch.bool),
            duplicate_rows=torch.zeros(out_features, dtype=torch.bool),
            duplicate_columns=duplicate_columns,
        )

    def update(self, start: int, block_OI: torch.Tensor) -> None:
        """Add the rows from ``start`` on; blocks must come in order."""
        stop = start + len(block_OI)
        self.zero_rows[start:stop] = vector_norm(block_OI, ord=inf, dim=1) == 0
        self.zero_columns.logical_and_(vector_norm(block_OI, ord=inf, dim=0) == 0)
        self.duplicate_rows[start + 1 : stop] = (block_OI[1:] == block_OI[:-1]).all(dim=1)
        if self._last_row is not None:
            self.duplicate_rows[start] = torch.equal(block_OI[0], self._last_row)
        self.duplicate_columns[1:].logical_and_((block_OI[:, 1:] == block_OI[:, :-1]).all(dim=0))
        self._last_row = block_OI[-1].clone()


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightComparison:
    """A weight before quantization (full precision) and after it (dequantized codes).

    Attributes:
        groups: Quantization groups that decode to other weights.
        saturated: Share of codes at either end of their range.
    """

    error: WeightError
    groups: GroupFaults
    saturated: float
    before: RowsAndColumns
    after: RowsAndColumns


def compare_weight(source: Checkpoint, linear: Linear, packed: PackedLinear) -> WeightComparison:
    """Compare a weight of ``source`` with its dequantized codes.

    Norms are float32 within a block of rows and float64 over blocks.
    """
    spec = TensorSpec(dtype=source[linear.tensor].dtype, shape=(linear.out_features, linear.in_features))
    before, after = (RowsAndColumns.of_shape(linear.out_features, linear.in_features) for _ in range(2))
    groups, ends, bits = GroupFaults(), 0, packed.format.bits
    squared_error = squared_norm = 0.0
    for start, stop in block_ranges(spec):
        w_OI, wq_OI = load_weight(source, linear, slice(start, stop)).float(), packed.weight_rows(start, stop)
        before.update(start, w_OI)
        after.update(start, wq_OI)
        groups.update(start, w_OI, wq_OI, packed.g_idx)
        codes_IO = unpack_rows(packed.qweight[:, start:stop], bits)
        ends += int(((codes_IO == 0) | (codes_IO == 2**bits - 1)).sum())
        squared_error += vector_norm(w_OI - wq_OI).item() ** 2
        squared_norm += vector_norm(w_OI).item() ** 2
    relative = (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0
    error = WeightError(module=linear.module, layer=linear.layer, kind=linear.kind, relative=relative)
    saturated = ends / (linear.out_features * linear.in_features)
    return WeightComparison(error=error, groups=groups, saturated=saturated, before=before, after=after)


@dataclass(slots=True)
class PaddingFindings:
    """The channels that padding added, over all layers.

    Attributes:
        channels: Number of channels of zeros.
        twins: Number of channels that were split off from the previous channel.
        audible: A sentence for each weight in which quantization changed added channels, so that they affect outputs.
    """

    channels: int = 0
    twins: int = 0
    audible: list[str] = field(default_factory=list[str])


def check_padding(comparisons: Mapping[tuple[int, str], WeightComparison]) -> PaddingFindings:
    """Check that quantization kept the channels that padding added.

    Channels of zeros are recognized by a zero row in gate and up and a zero column in down; they must stay exactly 0.
    Parts of a split channel are recognized by rows and columns that equal the previous ones: they read the same input,
    so their gate and up rows must stay equal. Their columns in down need not: GPTQ
    compensates in the second for the rounding of the first.

    Args:
        comparisons: (layer, kind) -> comparison; MLPs without one of the three are skipped.
    """
    findings = PaddingFindings()
    gates = [(layer, kind) for layer, kind in comparisons if kind.endswith("gate_proj")]
    for layer, kind in gates:
        owner = kind.removesuffix("gate_proj")
        gate, up, down = (comparisons.get((layer, f"{owner}{name}_proj")) for name in ("gate", "up", "down"))
        if not (gate and up and down):
            continue
        zero = gate.before.zero_rows & up.before.zero_rows & down.before.zero_columns
        duplicate = gate.before.duplicate_rows & up.before.duplicate_rows & down.before.duplicate_columns & ~zero
        findings.channels += int(zero.sum())
        findings.twins += int(duplicate.sum())
        for weight, added, kept, state in (
            (gate, zero, gate.after.zero_rows, "zero"),
            (up, zero, up.after.zero_rows, "zero"),
            (down, zero, down.after.zero_columns, "zero"),
            (gate, duplicate, gate.after.duplicate_rows, "equal to the previous channel"),
            (up, duplicate, up.after.duplicate_rows, "equal to the previous channel"),
        ):
            if changed := (added & ~kept).nonzero().flatten().tolist():
                findings.audible.append(
                    f"{weight.error.module}: {len(changed)} of {int(added.sum())} padded channels are not {state}, the"
                    f" first is {changed[0]}."
                )
    return findings
