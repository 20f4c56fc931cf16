"""Compare each quantized weight with the original, one block of rows at a time."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.evaluation.structure.groups import GroupFaults, Groups
from qwen_pipeline.qwen.linears import Linear, load_weight
from qwen_pipeline.transforms.codes.gptq import PackedLinear, count_extremes

BLOCK_WEIGHTS = {"cpu": 2**20, "cuda": 2**26}
"""Weights of a block of rows, by device: on a CPU a block and what is computed from it stay in its caches."""
HEAD = 64
"""Values of each row or column that are read before the others."""


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

    zero_rows: Tensor
    zero_columns: Tensor
    duplicate_rows: Tensor
    duplicate_columns: Tensor
    _last_row: Tensor | None = None

    @classmethod
    def of_shape(cls, out_features: int, in_features: int, device: torch.device) -> "RowsAndColumns":
        rows = torch.ones(out_features, dtype=torch.bool, device=device)
        columns = torch.ones(in_features, dtype=torch.bool, device=device)
        duplicates = columns.clone()
        duplicates[:1] = False
        return cls(
            zero_rows=rows, zero_columns=columns, duplicate_rows=rows.logical_not(), duplicate_columns=duplicates
        )

    def update(self, start: int, block_OI: Tensor) -> None:
        """Add the rows from ``start`` on; blocks must come in order.

        A row or column that differs in its first values is not read further.
        """
        stop, head_OI, head_rows_OI = start + len(block_OI), block_OI[:, :HEAD], block_OI[:HEAD]
        _narrow(self.zero_rows[start:stop], lambda at: _zero(head_OI[at], 1), lambda at: _zero(block_OI[at], 1))
        _narrow(self.zero_columns, lambda at: _zero(head_rows_OI[:, at], 0), lambda at: _zero(block_OI[:, at], 0))
        _narrow(
            self.duplicate_columns,
            lambda at: _equal(head_rows_OI[:, at], head_rows_OI[:, at - 1], 0),
            lambda at: _equal(block_OI[:, at], block_OI[:, at - 1], 0),
        )
        duplicate_rows = self.duplicate_rows[start:stop]
        duplicate_rows[1:] = True
        _narrow(
            duplicate_rows,
            lambda at: _equal(head_OI[at], head_OI[at - 1], 1),
            lambda at: _equal(block_OI[at], block_OI[at - 1], 1),
        )
        if self._last_row is not None:
            duplicate_rows[0] = torch.equal(block_OI[0], self._last_row)
        self._last_row = block_OI[-1].clone()

    def on_host(self) -> "RowsAndColumns":
        """Return the findings in the host's memory."""
        return RowsAndColumns(
            zero_rows=self.zero_rows.cpu(),
            zero_columns=self.zero_columns.cpu(),
            duplicate_rows=self.duplicate_rows.cpu(),
            duplicate_columns=self.duplicate_columns.cpu(),
        )


def _narrow(flags: Tensor, *tests: Callable[[Tensor], Tensor]) -> None:
    """Clear the flags that a test does not confirm; a test gets the numbers of those that are still set."""
    for test in tests:
        if len(still := flags.nonzero().flatten()):
            flags[still] = test(still)


def _zero(values: Tensor, axis: int) -> Tensor:
    return (values == 0).all(dim=axis)


def _equal(values: Tensor, others: Tensor, axis: int) -> Tensor:
    return (values == others).all(dim=axis)


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
    """Compare a weight of ``source`` with its dequantized codes, on the device that has them.

    Norms are float32 within a group and float64 over groups.
    """
    device, groups = packed.qweight.device, Groups.of(packed.g_idx)
    before, after = (RowsAndColumns.of_shape(linear.out_features, linear.in_features, device) for _ in range(2))
    faults, squares = GroupFaults(), torch.zeros(2, dtype=torch.float64, device=device)
    for start, w_OI in _blocks(source, linear, device):
        wq_OI = packed.weight_rows(start, start + len(w_OI))
        before.update(start, w_OI)
        after.update(start, wq_OI)
        squares += faults.update(start, w_OI, wq_OI, groups)
    error, norm = squares.sqrt().tolist()
    found = WeightError(
        module=linear.module, layer=linear.layer, kind=linear.kind, relative=error / norm if norm else 0.0
    )
    extremes = count_extremes(packed.qweight, packed.format.bits)
    return WeightComparison(
        error=found,
        groups=faults,
        saturated=extremes / (linear.out_features * linear.in_features),
        before=before.on_host(),
        after=after.on_host(),
    )


def kept_weight(source: Checkpoint, linear: Linear) -> WeightComparison:
    """Return the comparison of a weight that was not quantized, whose equality is checked elsewhere."""
    device = torch.device("cpu")
    found = RowsAndColumns.of_shape(linear.out_features, linear.in_features, device)
    for start, w_OI in _blocks(source, linear, device):
        found.update(start, w_OI)
    error = WeightError(module=linear.module, layer=linear.layer, kind=linear.kind, relative=0.0)
    return WeightComparison(error=error, groups=GroupFaults(), saturated=0.0, before=found, after=found)


def _blocks(source: Checkpoint, linear: Linear, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Yield a weight in float32, in blocks of rows, each with the number of its first row."""
    rows = max(1, BLOCK_WEIGHTS[device.type] // linear.in_features)
    expert_OI = load_weight(source, linear) if linear.expert_slice else None  # whose rows are not read one by one
    for start in range(0, linear.out_features, rows):
        stop = min(start + rows, linear.out_features)
        block_OI = load_weight(source, linear, slice(start, stop)) if expert_OI is None else expert_OI[start:stop]
        yield start, block_OI.to(device).float()


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
    so their gate and up rows must stay equal. Their columns in down need not: GPTQ compensates in the second
    for the rounding of the first.

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
