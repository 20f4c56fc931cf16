"""The search for scales, against trying every scale in float64 and against GPTQModel's grid."""

import pytest
import torch

from qwen_pipeline.quantization.recipes import ScaleSearch
from qwen_pipeline.quantization.steps.scale_search import SMALLEST_HALF, absmax_scales, searched_scales, stored

SEARCH = ScaleSearch()


def cost(target_CO: torch.Tensor, cost_C: torch.Tensor, scale_O: torch.Tensor, bits: int) -> torch.Tensor:
    target, scale, half = target_CO.double(), scale_O.double(), 2 ** (bits - 1)
    codes = (target / scale).round().clamp(-half, half - 1)
    return cost_C.double() @ (codes * scale - target).square()


@pytest.mark.parametrize("bits", [4, 8])
def test_no_tried_scale_costs_less(bits: int) -> None:
    target, costs = torch.randn(64, 200), torch.rand(64) + 0.1
    found = searched_scales(target, costs, bits=bits, search=SEARCH)
    least = torch.full((200,), torch.inf, dtype=torch.float64)
    for sign in (1, -1):
        for step in range(SEARCH.candidates):
            factor = SEARCH.smallest + step * (SEARCH.largest - SEARCH.smallest) / (SEARCH.candidates - 1)
            scale = (sign * factor * target.abs().amax(dim=0) / 2 ** (bits - 1)).half().float()
            least = torch.minimum(least, cost(target, costs, scale, bits))
    torch.testing.assert_close(cost(target, costs, found, bits), least, rtol=1e-4, atol=0)
    assert (found < 0).any()
    assert (found > 0).any()


def test_it_costs_less_than_gptqmodels_grid_and_signs_help() -> None:
    target, costs = torch.randn(64, 2000), torch.rand(64) + 0.1
    plain = cost(target, costs, absmax_scales(target, bits=4), 4).mean()
    unsigned = searched_scales(target, costs, bits=4, search=ScaleSearch(signed=False))
    signed = searched_scales(target, costs, bits=4, search=SEARCH)
    assert (unsigned > 0).all()
    assert cost(target, costs, signed, 4).mean() < cost(target, costs, unsigned, 4).mean() < plain


def test_scales_are_finite_and_not_zero_in_float16() -> None:
    """Groups of zeros get any scale; the scales of tiny weights are the smallest number of float16."""
    target = torch.zeros(32, 3)
    target[0, 1], target[0, 2] = 1e-9, -1e-9
    scales = searched_scales(target, torch.ones(32), bits=4, search=SEARCH)
    assert torch.equal(scales.half().float(), scales)
    assert (scales != 0).all()
    assert scales[1].abs() == scales[2].abs() == SMALLEST_HALF
    assert torch.equal(stored(torch.tensor([-1e-9, 1e-9, 0.1])), torch.tensor([-(2.0**-24), 2.0**-24, 0.0999755859375]))
