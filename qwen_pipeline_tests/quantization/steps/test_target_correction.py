"""Corrected targets, against their closed form in float64."""

from dataclasses import replace

import pytest
import torch

from qwen_pipeline.quantization.recipes import TargetCorrection
from qwen_pipeline.quantization.steps.target_correction import InputError, corrected
from qwen_pipeline_tests.quantization.steps.layer_inputs import DAMP, IN, layer_inputs


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_corrected_target_is_the_closed_form(strength: float, residual: bool) -> None:
    inputs = layer_inputs()
    correction = TargetCorrection(strength=strength, residual=residual)
    found = corrected(inputs.weight, inputs.error(), inputs.factor(), correction)

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
