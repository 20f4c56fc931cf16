"""GPTQ (arXiv:2210.17323): columns are rounded one by one, and those that follow make up for the error.

With the scales that GPTQModel computes, the codes are GPTQModel's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from qwen_pipeline.errors import CheckFailed
from qwen_pipeline.quantization.recipes import ScaleSearch
from qwen_pipeline.quantization.steps.products import float_product
from qwen_pipeline.quantization.steps.scale_search import group_scales

BLOCK = 128
"""GPTQModel's number of columns whose errors are passed on together to all that follow."""
DAMP_INCREMENT = 0.01
"""Damping that is added, as a share of the mean diagonal, until a Hessian is positive definite."""
TRIANGLE = 1024
"""Size up to which a triangular matrix is inverted at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InverseFactor:
    """The damped Hessian's inverse, ``upper.T @ upper``, in the order in which columns are rounded.

    Attributes:
        upper: An upper triangular matrix. A squared error in column c costs ``1 / upper[c, c] ** 2`` once the
            columns that follow have made up for it.
        order: The columns in that order.
        damp: Share of the mean diagonal that was added.
    """

    upper: Tensor
    order: Tensor
    damp: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """A weight on its grid.

    Attributes:
        weight: Scale times code.
        target: The weight that GPTQ was about to round in each column.
        scales: Values of float16, of either sign, in float32.
        loss: Squared error of each output, as GPTQ estimates it.
    """

    weight: Tensor
    target: Tensor
    scales: Tensor
    loss: Tensor

    def split(self, outputs: Sequence[int]) -> "Iterator[Rounded]":
        """Yield weights that were stacked, given their numbers of outputs."""
        parts = (getattr(self, name).split(list(outputs)) for name in ("weight", "target", "scales", "loss"))
        for weight_OI, target_OI, scales_OG, loss_O in zip(*parts, strict=True):
            yield Rounded(weight=weight_OI, target=target_OI, scales=scales_OG, loss=loss_O)


def group_aware_order(diagonal_I: Tensor, group_size: int) -> Tensor:
    """Return columns by descending diagonal within each group, and groups by their largest (arXiv:2505.14638)."""
    values_GC, within_GC = diagonal_I.view(-1, group_size).sort(dim=1, descending=True, stable=True)
    starts_G1 = torch.arange(0, len(diagonal_I), group_size, device=diagonal_I.device)[:, None]
    groups_G = values_GC[:, 0].argsort(descending=True, stable=True)
    return (within_GC + starts_G1)[groups_G].flatten()


def factored(hessian_II: Tensor, order_I: Tensor, damp: float) -> InverseFactor:
    """Factor the inverse of a Hessian, damped by at least ``damp`` of its mean diagonal.

    With the columns in reverse, the Hessian is ``lower @ lower.T``; reversed again, ``lower`` is upper triangular, and
    its inverse is the factor. The inverse Hessian itself is never computed.

    Raises:
        CheckFailed: It is not positive definite with any damping below 1; a NaN or an infinite value is the reason.
    """
    backward_I = order_I.flip(0)
    backward_II = hessian_II[backward_I][:, backward_I]
    diagonal_I = backward_II.diagonal().clone()
    while damp < 1:
        backward_II.diagonal().copy_(diagonal_I + damp * diagonal_I.mean())
        lower_II, failed = torch.linalg.cholesky_ex(backward_II)
        if not failed:
            del backward_II
            inverse_II = inverse_of_lower(lower_II)
            del lower_II
            return InverseFactor(upper=inverse_II.flip(0, 1), order=order_I, damp=damp)
        damp += DAMP_INCREMENT
    raise CheckFailed(
        "A Hessian is not positive definite, however much it is damped.",
        remedy="Look for NaN or infinite weights in the source; more calibration text does not help.",
    )


def inverse_of_lower(lower_II: Tensor) -> Tensor:
    """Return the inverse of a lower triangular matrix, by matrix products of its halves."""
    size = len(lower_II)
    if size <= TRIANGLE:
        eye_II = torch.eye(size, dtype=lower_II.dtype, device=lower_II.device)
        return torch.linalg.solve_triangular(lower_II, eye_II, upper=False)
    half = size // 2
    inverse_II = torch.zeros_like(lower_II)
    inverse_II[:half, :half] = inverse_of_lower(lower_II[:half, :half])
    inverse_II[half:, half:] = inverse_of_lower(lower_II[half:, half:])
    below_II = float_product(lower_II[half:, :half], inverse_II[:half, :half])
    inverse_II[half:, :half] = float_product(inverse_II[half:, half:], below_II).neg_()
    return inverse_II


def round_columns(
    weight_OI: Tensor,
    factor: InverseFactor,
    search: ScaleSearch | None,
    *,
    bits: int,
    group_size: int,
    block_size: int = BLOCK,
) -> Rounded:
    """Round a weight's columns one after another; each makes up for those before it.

    Weights are transposed here, so that the numbers of a column are next to each other.

    Args:
        weight_OI: The weight.
        factor: Factor of the inverse Hessian of the inputs.
        search: The scales to try for each group, for its weights as they are when the loop comes to it; None for those
            of GPTQModel's symmetric grid.
        bits: Bits of a code.
        group_size: Columns of a group.
        block_size: Columns whose errors are passed on to all that follow at once, a multiple of ``group_size``.
    """
    order_I, upper_II = factor.order, factor.upper
    target_IO = weight_OI.float().T[order_I]
    rounded_IO, loss_O = torch.empty_like(target_IO), target_IO.new_zeros(len(weight_OI))
    scales: list[Tensor] = []
    round_block = rounding_of(target_IO.device)
    for start in range(0, len(order_I), block_size):
        block = slice(start, start + block_size)
        rounded_IO[block], errors_BO, scales_GO = round_block(
            target_IO[block], upper_II[block, block], bits=bits, group_size=group_size, search=search
        )
        scales += scales_GO
        loss_O += errors_BO.square().sum(dim=0) / 2
        target_IO[block.stop :] -= upper_II[block, block.stop :].T @ errors_BO
    places_I = order_I.argsort()
    groups_G = order_I[::group_size] // group_size
    return Rounded(
        weight=rounded_IO[places_I].T,
        target=target_IO[places_I].T,
        scales=torch.stack(scales, dim=1)[:, groups_G.argsort()],
        loss=loss_O,
    )


class BlockRounding(Protocol):
    """Rounds the columns of one block, given its weights [B, O] and its part of the factor [B, B].

    The weights are changed to what they were when they were rounded. It returns the rounded weights, their errors
    as shares of the roots of the factor's diagonal, and the scales [G, O].
    """

    def __call__(
        self, target_BO: Tensor, upper_BB: Tensor, *, bits: int, group_size: int, search: ScaleSearch | None
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def rounding_of(device: torch.device) -> BlockRounding:
    """Return the rounding of blocks for a device; both give the same codes but for how costs of scales are summed."""
    if device.type == "cuda" and find_spec("triton"):
        return import_module("qwen_pipeline.quantization.steps.rounding_kernel").round_block
    return round_block_by_columns


def round_block_by_columns(
    target_BO: Tensor, upper_BB: Tensor, *, bits: int, group_size: int, search: ScaleSearch | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Round the columns of one block, each by a few operations over all outputs: see :class:`BlockRounding`."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    rounded_BO, errors_BO, scales = torch.empty_like(target_BO), torch.empty_like(target_BO), list[Tensor]()
    for column, root in enumerate(upper_BB.diagonal()):
        if column % group_size == 0:
            of_group = slice(column, column + group_size)
            costs_C = upper_BB.diagonal()[of_group] ** -2
            scales.append(group_scales(target_BO[of_group], costs_C, bits=bits, search=search))
        torch.div(target_BO[column], scales[-1], out=rounded_BO[column])
        rounded_BO[column].round_().clamp_(low, high).mul_(scales[-1])
        torch.sub(target_BO[column], rounded_BO[column], out=errors_BO[column]).div_(root)
        target_BO[column + 1 :] -= upper_BB[column, column + 1 :, None] * errors_BO[column]
    return rounded_BO, errors_BO, torch.stack(scales)
