"""GPTQ's rounding of a block of columns as one kernel on a GPU.

Outputs are independent of each other. So each program takes some outputs, holds their weights of the block in
registers, and searches scales and rounds column by column there: a weight is read and written once a block. The columns
one by one, as several kernels each, take far longer to launch than to compute.
"""

# pyright: basic, reportMissingImports=false, reportIndexIssue=false
# Triton comes with PyTorch for CUDA alone, and its kernels are not typed.

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_pipeline.quantization.recipes import ScaleSearch

OUTPUTS = tl.constexpr(32)
"""Outputs of a program."""


def round_block(
    target_BO: Tensor, upper_BB: Tensor, *, bits: int, group_size: int, search: ScaleSearch | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Round the columns of a block: see :class:`~qwen_pipeline.quantization.steps.gptq.BlockRounding`.

    Args:
        target_BO: The weights, float32, contiguous; changed to what they were when they were rounded.
        upper_BB: Their part of the factor.
        bits: Bits of a code.
        group_size: Columns of a group, a divisor of their number.
        search: The scales to try; None for those of GPTQModel's symmetric grid.
    """
    columns, outputs = target_BO.shape
    results = target_BO.new_empty(2 * columns + columns // group_size, outputs)
    factors_K = _factors(search, target_BO.device)
    _round_block[(triton.cdiv(outputs, OUTPUTS.value),)](
        target_BO, upper_BB.contiguous(), results, factors_K, outputs,
        columns=columns, rows=triton.next_power_of_2(columns), group_size=group_size, half=2 ** (bits - 1),
        candidates=len(factors_K), enable_fp_fusion=False,
    )  # fmt: skip
    rounded_BO, errors_BO, scales_GO = results.split([columns, columns, columns // group_size])
    return rounded_BO, errors_BO, scales_GO


def _factors(search: ScaleSearch | None, device: torch.device) -> Tensor:
    if not search:
        return torch.empty(0, device=device)
    factors_K = torch.linspace(search.smallest, search.largest, search.candidates, device=device)
    return torch.cat([factors_K, -factors_K]) if search.signed else factors_K


@triton.jit
def _round_block(
    target: tl.tensor,
    upper: tl.tensor,
    results: tl.tensor,
    factors: tl.tensor,
    outputs: tl.tensor,
    columns: tl.constexpr,
    rows: tl.constexpr,
    group_size: tl.constexpr,
    half: tl.constexpr,
    candidates: tl.constexpr,
) -> None:
    """Round some outputs; ``rows`` is ``columns`` or the next power of two.

    The results are the rows of rounded weights, then those of errors, then those of scales.
    """
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.arange(0, rows)
    inside = output < outputs
    places = row[:, None] * outputs + output[None, :]
    both = (row[:, None] < columns) & inside[None, :]
    weights = tl.load(target + places, mask=both, other=0.0)
    scale = tl.full([OUTPUTS], 1.0, tl.float32)
    for column in range(columns):
        root = tl.load(upper + column * columns + column)
        if column % group_size == 0:
            of_group = (row >= column) & (row < column + group_size)
            group = tl.where(of_group[:, None], weights, 0.0)
            if candidates:
                roots = tl.load(upper + row * columns + row, mask=of_group, other=1.0)
                cost = tl.where(of_group, tl.div_rn(1.0, roots * roots), 0.0)
                scale = _searched(group, cost, factors, half, candidates)
            else:
                scale = _absmax(group, half)
            tl.store(results + (2 * columns + column // group_size) * outputs + output, scale, mask=inside)
        weight = tl.sum(tl.where((row == column)[:, None], weights, 0.0), axis=0)
        code = _on_grid(tl.div_rn(weight, scale), half)
        value = code * scale
        error = tl.div_rn(weight - value, root)
        tl.store(results + column * outputs + output, value, mask=inside)
        tl.store(results + (columns + column) * outputs + output, error, mask=inside)
        later = tl.load(upper + column * columns + row, mask=(row > column) & (row < columns), other=0.0)
        weights = tl.where((row > column)[:, None], weights - later[:, None] * error[None, :], weights)
    tl.store(target + places, weights, mask=both)


@triton.jit
def _searched(
    group: tl.tensor, cost: tl.tensor, factors: tl.tensor, half: tl.constexpr, candidates: tl.constexpr
) -> tl.tensor:
    """See :func:`~qwen_pipeline.quantization.steps.scale_search.searched_scales`."""
    step = tl.max(tl.abs(group), axis=0) * (1.0 / half)
    step = tl.where(step == 0, 1.0, step)
    best, least = step, tl.full(step.shape, float("inf"), tl.float32)
    for candidate in range(candidates):
        scale = _stored(tl.load(factors + candidate) * step)
        wide = tl.broadcast_to(scale[None, :], group.shape)
        error = _on_grid(tl.div_rn(group, wide), half) * wide - group
        found = tl.sum(cost[:, None] * (error * error), axis=0)
        best, least = tl.where(found < least, scale, best), tl.minimum(found, least)
    return best


@triton.jit
def _absmax(group: tl.tensor, half: tl.constexpr) -> tl.tensor:
    """See :func:`~qwen_pipeline.quantization.steps.scale_search.absmax_scales`."""
    low, high = tl.minimum(tl.min(group, axis=0), 0.0), tl.maximum(tl.max(group, axis=0), 0.0)
    high = tl.maximum(high, -low)
    low = tl.where(low < 0, -high, low)
    span = tl.where(high == 0, 1.0, high) - tl.where(high == 0, -1.0, low)
    return _stored(tl.div_rn(span, tl.full(span.shape, 2 * half - 1, tl.float32)))


@triton.jit
def _stored(scale: tl.tensor) -> tl.tensor:
    """Round scales to float16, none of them to zero."""
    rounded = scale.to(tl.float16).to(tl.float32)
    smallest = tl.where(scale < 0, -5.9604644775390625e-08, 5.9604644775390625e-08)
    return tl.where(rounded == 0, smallest, rounded)


@triton.jit
def _on_grid(quotient: tl.tensor, half: tl.constexpr) -> tl.tensor:
    """Clamp to the codes and round half to even, by a number so large that its fraction has no bit left."""
    clamped = tl.minimum(tl.maximum(quotient, -half * 1.0), half - 1.0)
    return (clamped + 12582912.0) - 12582912.0
