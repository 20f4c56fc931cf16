"""Search for the scale of each group that costs the least, weighted by curvature, on the weights as they are rounded.

GPTQModel's symmetric grid steps by 2/15 of the largest weight: a largest weight that is positive lands on 7.5 and is
clamped to 7, and code -8 is not used. Here the step is about 1/8 of it, and the scale has the sign with which -8
serves the outermost weight. Of many factors, the one is kept whose errors cost the least after later columns have made
up for them.
"""

import torch
from torch import Tensor

from qwen_pipeline.quantization.recipes import ScaleSearch

SMALLEST_HALF = 2.0**-24


def group_scales(target_CO: Tensor, cost_C: Tensor, *, bits: int, search: ScaleSearch | None) -> Tensor:
    """Return the scales [O] of a group: the searched ones, or without a search those of GPTQModel's grid."""
    if search is None:
        return absmax_scales(target_CO, bits=bits)
    return searched_scales(target_CO, cost_C, bits=bits, search=search)


def searched_scales(target_CO: Tensor, cost_C: Tensor, *, bits: int, search: ScaleSearch) -> Tensor:
    """Return the scales [O] of a group with the least ``sum_c cost_c * (w_c - s * code_c) ** 2``, as they are stored.

    Args:
        target_CO: The weights of the group's columns.
        cost_C: Cost of a squared error in each column.
        bits: Bits of a code.
        search: The scales to try.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    step_O = target_CO.abs().amax(dim=0) / -low
    step_O.masked_fill_(step_O == 0, 1)  # any scale is exact for zeros
    factors_K = torch.linspace(search.smallest, search.largest, search.candidates, device=step_O.device)[:, None]
    scales_KO = stored(torch.cat([factors_K, -factors_K] if search.signed else [factors_K]) * step_O)
    costs_KO, errors_CO = torch.empty_like(scales_KO), torch.empty_like(target_CO)
    for scales_O, costs_O in zip(scales_KO, costs_KO, strict=True):
        torch.div(target_CO, scales_O, out=errors_CO).round_().clamp_(low, high).mul_(scales_O).sub_(target_CO)
        torch.mv(errors_CO.square_().T, cost_C, out=costs_O)
    return scales_KO.gather(0, costs_KO.argmin(dim=0, keepdim=True))[0]


def absmax_scales(target_CO: Tensor, *, bits: int) -> Tensor:
    """Return the scales [O] of GPTQModel's symmetric grid for a group, as they are stored."""
    low_O, high_O = target_CO.amin(dim=0).clamp_(max=0), target_CO.amax(dim=0).clamp_(min=0)
    high_O = torch.maximum(high_O, -low_O)
    low_O = torch.where(low_O < 0, -high_O, low_O)
    zero_O = high_O == 0
    return stored((high_O.masked_fill_(zero_O, 1) - low_O.masked_fill_(zero_O, -1)) / (2**bits - 1))


def stored(scale_O: Tensor) -> Tensor:
    """Return scales rounded to float16, none of them to zero."""
    half_O = scale_O.half().float()
    return torch.where(half_O == 0, scale_O.sign() * SMALLEST_HALF, half_O)
