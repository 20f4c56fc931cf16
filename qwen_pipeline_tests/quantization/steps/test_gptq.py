"""The solver's loop, against rounding column by column in float64; GPTQModel's codes are in ``test_solve``."""

import pytest
import torch

from qwen_pipeline.errors import CheckFailed
from qwen_pipeline.quantization.steps.gptq import factored, group_aware_order, round_columns
from qwen_pipeline_tests.quantization.steps.layer_inputs import GROUP_SIZE, IN, OUT, layer_inputs


def test_groups_are_ordered_by_their_largest_and_channels_within_them() -> None:
    order = group_aware_order(torch.tensor([1.0, 5.0, 2.0, 7.0, 6.0, 3.0]), 2)
    assert order.tolist() == [3, 2, 4, 5, 1, 0]


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    inputs = layer_inputs()
    factor = inputs.factor()
    hessian = 2 / len(inputs.quantized) * inputs.quantized.double().T @ inputs.quantized.double()
    damped = hessian + factor.damp * hessian.diagonal().mean() * torch.eye(IN)
    ordered = damped[factor.order][:, factor.order]
    upper = factor.upper.double()
    torch.testing.assert_close(upper.T @ upper @ ordered, torch.eye(IN, dtype=torch.float64), rtol=1e-3, atol=1e-3)
    assert torch.equal(factor.upper.triu(), factor.upper)


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_each_column_makes_up_for_those_before_it(block_size: int) -> None:
    """Oracle: after each column the others are the least squares solution that keeps the rounded ones (OBQ)."""
    inputs = layer_inputs()
    factor = inputs.factor()
    found = round_columns(inputs.weight, factor, None, bits=4, group_size=GROUP_SIZE, block_size=block_size)
    inverse = (factor.upper.double().T @ factor.upper.double())[:IN, :IN]
    hessian = inverse.inverse()
    weight = inputs.weight.double()[:, factor.order]
    rounded = found.weight.double()[:, factor.order]
    for column in (1, 31, 64, 127):
        fixed, free = slice(0, column), slice(column, IN)
        change = (weight - rounded)[:, fixed] @ hessian[fixed, free] @ hessian[free, free].inverse()
        expected = (weight[:, free] + change)[:, 0]
        torch.testing.assert_close(found.target.double()[:, factor.order][:, column], expected, rtol=1e-3, atol=1e-4)


def test_codes_scales_and_losses_fit_together() -> None:
    inputs = layer_inputs()
    factor = inputs.factor()
    found = round_columns(inputs.weight, factor, None, bits=4, group_size=GROUP_SIZE)
    scale = found.scales.repeat_interleave(GROUP_SIZE, dim=1)
    codes = (found.target / scale).round().clamp(-8, 7)
    assert torch.equal(codes * scale, found.weight)
    roots = torch.empty(IN).scatter_(0, factor.order, factor.upper.diagonal())
    expected = ((found.target - found.weight) / roots).square().sum(dim=1) / 2
    torch.testing.assert_close(found.loss, expected)
    parts = list(found.split([32, OUT - 32]))
    assert torch.equal(torch.cat([part.weight for part in parts]), found.weight)


def test_a_hessian_is_damped_more_until_it_is_positive_definite() -> None:
    hessian = torch.eye(4)
    hessian[0, 1] = hessian[1, 0] = 1.03
    assert factored(hessian, torch.arange(4), 0.01).damp == pytest.approx(0.04)
    with pytest.raises(CheckFailed, match="positive definite"):
        factored(hessian * torch.nan, torch.arange(4), 0.05)
