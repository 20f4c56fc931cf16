"""``W + scaling * B @ A`` for some rows of ``W``, with the same bits whatever rows are asked for together."""

from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.buffers import empty

if TYPE_CHECKING:
    import torch

CELL_ROWS = 64
"""Rows that are computed together, counted from the top of the whole tensor.

A library may sum in another order when it is given another number of rows. All rows of a cell are always computed,
whichever are wanted. In float32 a cell also fits the processor's cache, where a block does not.
"""


def merged_weight(
    w_OI: "torch.Tensor", a_RI: "torch.Tensor", b_OR: "torch.Tensor", *, scaling: float
) -> "torch.Tensor":
    """Return ``W + scaling * B @ A``, computed in float32 and rounded once to ``W.dtype`` (arXiv:2106.09685).

    A float32 or float64 ``W`` is computed in float64. PEFT may round the delta first, so bf16 results may differ from
    its in the last bit.
    """
    return merged_rows(w_OI, a_RI, b_OR, scaling=scaling, above=0)


def cell_range(start: int, stop: int, rows: int) -> tuple[int, int]:
    """Return the rows of all cells that rows ``start:stop`` of a tensor with so many rows lie in."""
    return start - start % CELL_ROWS, min(-(-stop // CELL_ROWS) * CELL_ROWS, rows)


def merged_rows(
    w_OI: "torch.Tensor", a_RI: "torch.Tensor", b_OR: "torch.Tensor", *, scaling: float, above: int
) -> "torch.Tensor":
    """Return :func:`merged_weight` for some rows.

    Args:
        w_OI: The rows wanted.
        a_RI: The whole factor A.
        b_OR: The factor B for all rows of :func:`cell_range`.
        scaling: Of the update.
        above: How many rows of ``b_OR`` lie above the first of ``w_OI``.
    """
    import torch

    wide = torch.float64 if w_OI.dtype.itemsize > 2 else torch.float32
    merged_OI, cell = empty(tuple(w_OI.shape), w_OI.dtype), empty((CELL_ROWS, w_OI.shape[1]), wide)
    a_RI, b_OR = a_RI.to(wide), b_OR.to(wide)
    for top in range(0, len(b_OR), CELL_ROWS):
        b = b_OR[top : top + CELL_ROWS]
        first, last = max(top - above, 0), min(top - above + len(b), len(w_OI))
        inside = cell[first + above - top : last + above - top]
        sum_OI = cell[: len(b)]
        if len(inside) < len(b):
            sum_OI.zero_()
        inside.copy_(w_OI[first:last])
        sum_OI.addmm_(b, a_RI, alpha=scaling)
        merged_OI[first:last].copy_(inside)
    return merged_OI
