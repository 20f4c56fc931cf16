"""Corrected targets, against their closed form in float64."""

from dataclasses import fields, replace

import pytest
import torch

from qwen_pipeline.quantization.recipes import TargetCorrection
from qwen_pipeline.quantization.steps import products
from qwen_pipeline.quantization.steps.target_correction import InputError, corrected
from qwen_pipeline_tests.quantization.steps.layer_inputs import DAMP, IN, LayerInputs, layer_inputs


@pytest.mark.parametrize(("residual", "of_outputs"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("copies", [1, 2])  # with more outputs than inputs, the products are in another order
def test_a_corrected_target_is_the_closed_form(strength: float, residual: bool, of_outputs: bool, copies: int) -> None:
    inputs = layer_inputs()
    inputs = replace(inputs, weight=torch.cat([inputs.weight] * copies))
    if residual:
        both = (torch.cat([each] * copies, dim=1) for each in (inputs.residual_full, inputs.residual))
        inputs = replace(inputs, **dict(zip(("residual_full", "residual"), both, strict=True)))
    error = inputs.error(residual=residual, of_outputs=of_outputs)
    found = corrected(inputs.weight, error, inputs.factor(), TargetCorrection(strength=strength))

    full, quantized, weight = inputs.full.double(), inputs.quantized.double(), inputs.weight.double()
    hessian = quantized.T @ quantized
    damped = hessian + DAMP * hessian.diagonal().mean() * torch.eye(IN)
    missing = (full - quantized) @ weight.T
    if residual:
        missing += inputs.residual_full.double() - inputs.residual.double()
    expected = weight + strength * (missing.T @ quantized) @ damped.inverse()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, inputs.weight, atol=1e-3)


def test_the_outputs_come_closer_to_the_full_precision_models() -> None:
    inputs = layer_inputs()
    outputs = inputs.full @ inputs.weight.T + inputs.residual_full

    def distance(weight: torch.Tensor) -> float:
        return (inputs.quantized @ weight.T + inputs.residual - outputs).square().sum().item()

    half, whole = (
        corrected(inputs.weight, inputs.error(), inputs.factor(), TargetCorrection(strength=strength))
        for strength in (0.5, 1.0)
    )
    assert distance(whole) < distance(half) < distance(inputs.weight)


def test_nothing_is_corrected_with_strength_zero_equal_inputs_or_no_tokens() -> None:
    inputs = layer_inputs()
    same = replace(inputs, full=inputs.quantized, residual_full=inputs.residual)
    for error, strength in ((inputs.error(), 0.0), (same.error(), 1.0), (InputError(), 1.0)):
        found = corrected(inputs.weight, error, inputs.factor(), TargetCorrection(strength=strength))
        assert torch.equal(found, inputs.weight)


@pytest.mark.gpu
def test_a_gpus_correction_is_right_to_four_digits() -> None:
    inputs = layer_inputs()
    exact = corrected(inputs.weight, inputs.error(), inputs.factor(), TargetCorrection())
    moved = LayerInputs(**{field.name: getattr(inputs, field.name).cuda() for field in fields(inputs)})
    found = corrected(moved.weight, moved.error(), moved.factor(), TargetCorrection()).cpu()
    share = (found - exact).norm() / (exact - inputs.weight).norm()
    assert share < 1e-4


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_product_of_parts_is_right_to_six_digits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "ROWS", 128)
    left, right = torch.randn(300, 4000, device=device), torch.randn(4000, 200, device=device)
    exact = left.double() @ right.double()
    error = products.product_of_parts(left, right) - exact
    assert error.norm() < 2e-6 * exact.norm()
    assert not torch.backends.cuda.matmul.allow_tf32
