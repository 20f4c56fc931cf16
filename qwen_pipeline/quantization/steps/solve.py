"""The codes of linear layers that share their inputs, by the steps of a recipe that treat one linear layer."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qwen_pipeline.errors import CheckFailed
from qwen_pipeline.quantization.losses import NOT_SOLVED
from qwen_pipeline.quantization.solver import Hessian, Solved, pack, zero_and_saturated_groups
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.quantization.steps.gptq import (
    Rounded,
    factored,
    group_aware_order,
    round_columns,
)
from qwen_pipeline.quantization.steps.step_errors import StepErrors
from qwen_pipeline.quantization.steps.target_correction import InputError, corrected
from qwen_pipeline.transforms.codes.gptq import gptq_format, in_order


def solve_by_recipe(
    weights: Mapping[str, Tensor], hessian: Hessian, error: InputError, spec: QuantSpec, *, measured: bool = True
) -> dict[str, Solved]:
    """Return codes for the weights [O, I] of modules that share their inputs, chosen to preserve the modules' outputs.

    Weights with the same damping share the factor of one inverse Hessian, and are rounded together. The Hessian is
    consumed, the weights are unchanged.

    Args:
        weights: Module -> weight.
        hessian: Hessian of the inputs in the quantized model.
        error: Error of the inputs; empty for a recipe that does not correct targets.
        spec: Settings of the quantization, among them the recipe.
        measured: Whether the errors after each step are measured.

    Raises:
        CheckFailed: A loss is NaN, or the Hessian is not positive definite.
    """
    tokens, mean_II = hessian.tokens, hessian.pop_mean().to(next(iter(weights.values())).device)
    dead_I = _settled(mean_II)
    order_I, solved = _order(mean_II, spec), dict[str, Solved]()
    for damp, modules in _by_damping(weights, spec).items():
        factor = factored(mean_II, order_I, damp)
        outputs = [len(weights[module]) for module in modules]
        target_OI = torch.cat([weights[module].float() for module in modules])
        steps = StepErrors(target_OI, outputs, mean_II, error, factor) if measured else None
        if spec.steps.target_correction:
            target_OI = corrected(target_OI, error, factor, spec.steps.target_correction)
        target_OI[:, dead_I] = 0
        if steps:
            steps.drop(dead_I)
        size = {"bits": spec.bits, "group_size": spec.group_size}
        rounded = round_columns(target_OI, factor, spec.steps.scale_search, **size)
        errors = [dict[str, float]()] * len(modules)
        if steps:
            errors = steps.measured(target_OI, rounded.weight, **size)
        del target_OI
        for module, part, found in zip(modules, rounded.split(outputs), errors, strict=True):
            solved[module] = replace(_packed(module, part, factor.damp, tokens, spec), errors=found)
    return {module: solved[module] for module in weights}


def _by_damping(modules: Iterable[str], spec: QuantSpec) -> dict[float, list[str]]:
    by_damping: dict[float, list[str]] = {}
    for module in modules:
        by_damping.setdefault(spec.override(module).get("damp_percent", spec.damp_percent), []).append(module)
    return by_damping


def _settled(hessian_II: Tensor) -> Tensor:
    """Settle dead channels as :mod:`~qwen_pipeline.quantization.dead_channels` explains; return them, bool [I]."""
    diagonal_I = hessian_II.diagonal()
    dead_I = diagonal_I == 0
    diagonal_I[dead_I] = 1 if dead_I.all() else diagonal_I[~dead_I].mean()
    return dead_I


def _order(hessian_II: Tensor, spec: QuantSpec) -> Tensor:
    if spec.act_group_aware:
        return group_aware_order(hessian_II.diagonal(), spec.group_size)
    return torch.arange(len(hessian_II), device=hessian_II.device)


def _packed(module: str, rounded: Rounded, damp: float, tokens: int, spec: QuantSpec) -> Solved:
    """Pack the codes of a weight.

    Raises:
        CheckFailed: The loss is NaN.
    """
    loss = rounded.loss.double().sum().item()
    if math.isnan(loss):
        raise CheckFailed(
            f"The loss of {module} is NaN.",
            remedy="Look for NaN or infinite weights in the source; more calibration text does not help.",
        )
    return Solved(
        **_codes(rounded.weight, rounded.scales, spec),
        loss=loss / tokens if tokens else NOT_SOLVED,
        damp=damp,
        target=rounded.target if spec.steps.learned_rounding else None,
    )


def repacked(weight_OI: Tensor, scales_OG: Tensor, solved: Solved, spec: QuantSpec) -> Solved:
    """Return a solution with other codes; its target is dropped."""
    return replace(solved, **_codes(weight_OI, scales_OG, spec), target=None)


def _codes(weight_OI: Tensor, scales_OG: Tensor, spec: QuantSpec) -> dict[str, Any]:
    """Return the fields of :class:`Solved` that describe the codes of a weight on its grid."""
    form = gptq_format({"quantization_config": spec.quantization_config("")})
    zeros_OG = torch.full_like(scales_OG, 2 ** (spec.bits - 1))
    g_idx = in_order(weight_OI.shape[1], spec.group_size).to(zeros_OG.device)
    packed = pack(weight_OI, scales_OG, zeros_OG, g_idx, form)
    zero, saturated = zero_and_saturated_groups(packed)
    return {"packed": packed, "zero_groups": zero, "saturated_groups": saturated}
