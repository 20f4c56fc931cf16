"""The solver of one linear layer: GPTQModel's codes without further steps, and less error with each step."""

from dataclasses import replace
from pathlib import Path
from typing import get_args
from unittest.mock import patch

import pytest
import torch

from qwen_pipeline.errors import CheckFailed
from qwen_pipeline.quantization import spec as spec_module
from qwen_pipeline.quantization.losses import NOT_SOLVED
from qwen_pipeline.quantization.recipes import RECIPES, LearnedRounding, Recipe, RecipeName, ScaleSearch
from qwen_pipeline.quantization.solver import Hessian
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.quantization.steps import step_errors
from qwen_pipeline.quantization.steps.solve import solve_by_recipe
from qwen_pipeline.quantization.steps.target_correction import InputError
from qwen_pipeline.workers.environments import find_environment
from qwen_pipeline.workers.parent import run_worker
from qwen_pipeline_tests.quantization.steps.layer_inputs import IN, OUT, layer_inputs

SPEC = QuantSpec(recipe="fast", group_size=32, device="cpu", threads=1)
PLAIN = replace(SPEC, recipe="gptq")


@pytest.mark.slow
@pytest.mark.engine
def test_without_further_steps_the_codes_are_gptqmodels(tmp_path: Path) -> None:
    target = "qwen_pipeline_tests.quantization.steps.gptqmodel_codes:compare"
    found = run_worker(find_environment("gptqmodel").python, target, {}, log=tmp_path / "log").value
    assert len(found) == 12
    for setting, (differing, loss) in found.items():
        assert differing == [], setting
        assert loss == pytest.approx(1, rel=1e-5), setting


def test_the_search_for_scales_lowers_the_objective_and_signs_lower_it_further() -> None:
    """The objective is ``tr((W - Q) H (W - Q)^T)``, over several layers."""

    def objective(steps: Recipe) -> float:
        total = 0.0
        for seed in range(6):
            inputs = layer_inputs(seed)
            with patch.dict(spec_module.RECIPES, fast=steps):
                packed = solve_by_recipe({"q": inputs.weight}, inputs.hessian(), InputError(), SPEC)["q"].packed
            total += ((inputs.weight - packed.weight_rows(0, OUT)) @ inputs.quantized.T).square().sum().item()
        return total

    unsigned, signed = (Recipe(scale_search=ScaleSearch(signed=signed)) for signed in (False, True))
    assert objective(signed) < 0.97 * objective(unsigned) < 0.94 * objective(Recipe())


def test_corrected_targets_bring_the_outputs_closer_to_full_precision() -> None:
    inputs = layer_inputs()
    outputs = inputs.full @ inputs.weight.T + inputs.residual_full

    def distance(error: InputError) -> float:
        packed = solve_by_recipe({"q": inputs.weight}, inputs.hessian(), error, SPEC)["q"].packed
        return (inputs.quantized @ packed.weight_rows(0, OUT).T + inputs.residual - outputs).square().sum().item()

    assert distance(inputs.error()) < distance(inputs.error(residual=False)) < distance(InputError())


def test_the_errors_after_each_step_are_those_of_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle computes outputs; the best weight solves the damped normal equations in float64."""
    monkeypatch.setattr(step_errors, "SAMPLE", OUT)
    inputs = layer_inputs()
    quantized, weight = inputs.quantized.double(), inputs.weight.double()
    missing = inputs.full.double() @ weight.T - quantized @ weight.T + inputs.residual_full - inputs.residual
    gram = quantized.T @ quantized
    gram += SPEC.damp_percent * gram.diagonal().mean() * torch.eye(IN)
    best = weight + torch.linalg.solve(gram, quantized.T @ missing).T

    def error(recipe: Recipe) -> float:
        with patch.dict(spec_module.RECIPES, fast=recipe):
            solved = solve_by_recipe({"q": inputs.weight}, inputs.hessian(), inputs.error(), SPEC)["q"]
        difference = solved.packed.weight_rows(0, OUT).double() - best
        return float((quantized @ difference.T).square().sum() / (quantized @ weight.T).square().sum())

    fast = RECIPES["fast"]
    errors = solve_by_recipe({"q": inputs.weight}, inputs.hessian(), inputs.error(), SPEC)["q"].errors
    steps = {"gptq_error": Recipe(), "corrected_error": replace(fast, scale_search=None), "searched_error": fast}
    assert errors == pytest.approx({name: error(recipe) for name, recipe in steps.items()}, rel=1e-3)
    assert errors["searched_error"] < errors["corrected_error"] < errors["gptq_error"]


def test_dead_channels_and_rows_of_zeros_are_exactly_zero_and_change_nothing() -> None:
    inputs = layer_inputs()
    inputs.quantized[:, 96:] = inputs.full[:, 96:] = 0
    inputs.weight[-32:] = 0
    solved = solve_by_recipe({"q": inputs.weight}, inputs.hessian(), inputs.error(residual=False), SPEC)["q"]
    weight = solved.packed.weight_rows(0, OUT)
    assert not weight[:, 96:].any()
    assert not weight[-32:].any()
    assert solved.zero_groups == OUT + 32 * 3
    live = replace(inputs, weight=inputs.weight[:64, :96], full=inputs.full[:, :96], quantized=inputs.quantized[:, :96])
    hessian, error = Hessian(96), InputError()
    hessian.add(live.quantized)
    error.add(full=live.full, quantized=live.quantized)
    alone = solve_by_recipe({"q": live.weight}, hessian, error, SPEC)["q"].packed.weight_rows(0, 64)
    assert (alone != weight[:64, :96]).float().mean() < 1e-3


def test_weights_with_the_same_inputs_have_the_codes_they_have_alone() -> None:
    """Those with a damping of their own have another factor."""
    inputs = layer_inputs()
    spec = replace(SPEC, dynamic={"^k$": {"damp_percent": 0.2}})
    weights = {"q": inputs.weight[:32], "k": inputs.weight[32:64], "v": inputs.weight[64:]}
    together = solve_by_recipe(weights, inputs.hessian(), inputs.error(residual=False), spec)
    assert list(together) == ["q", "k", "v"]
    assert [solved.damp for solved in together.values()] == [0.05, 0.2, 0.05]
    for name, weight in weights.items():
        alone = solve_by_recipe({name: weight}, inputs.hessian(), inputs.error(residual=False), spec)[name]
        assert (alone.packed.qweight != together[name].packed.qweight).float().mean() < 0.02
        torch.testing.assert_close(alone.loss, together[name].loss, rtol=1e-3, atol=0)
        assert alone.target is None


def test_equal_rows_stay_equal() -> None:
    inputs = layer_inputs()
    inputs.weight[1:] = inputs.weight[:-1].clone()[torch.arange(OUT - 1) // 2 * 2]
    weight = solve_by_recipe({"q": inputs.weight}, inputs.hessian(), inputs.error(residual=False), SPEC)["q"]
    rows = weight.packed.weight_rows(0, OUT)
    before = (inputs.weight[1:] == inputs.weight[:-1]).all(dim=1)
    assert before.sum() >= OUT // 2 - 1
    assert torch.equal((rows[1:] == rows[:-1]).all(dim=1), before)


def test_targets_are_kept_for_a_recipe_that_learns_alone() -> None:
    inputs = layer_inputs()
    solved = solve_by_recipe({"q": inputs.weight}, inputs.hessian(), InputError(), replace(SPEC, recipe="best"))["q"]
    assert solved.target is not None
    scale = solved.packed.scales.T.float().repeat_interleave(32, dim=1)
    assert torch.equal((solved.target / scale).round().clamp(-8, 7) * scale, solved.packed.weight_rows(0, OUT))


def test_an_expert_without_tokens_is_only_rounded_and_a_nan_is_refused() -> None:
    inputs = layer_inputs()
    solved = solve_by_recipe({"q": inputs.weight}, Hessian(IN), InputError(), SPEC)["q"]
    assert solved.loss == NOT_SOLVED
    error = (inputs.weight - solved.packed.weight_rows(0, OUT)).norm() / inputs.weight.norm()
    assert 0.05 < error < 0.12
    inputs.weight[3, 4] = torch.nan
    with pytest.raises(CheckFailed, match="q is NaN"):
        solve_by_recipe({"q": inputs.weight}, inputs.hessian(), InputError(), SPEC)


def test_the_recipes_are_those_that_code_version_names() -> None:
    """A change here changes codes: raise the stage's code version along with it."""
    assert set(RECIPES) == set(get_args(RecipeName))
    assert RECIPES["gptq"] == Recipe()
    search, correction = RECIPES["fast"].scale_search, RECIPES["fast"].target_correction
    assert search
    assert correction
    assert (search.smallest, search.largest, search.candidates, search.signed) == (0.62, 1.16, 28, True)
    assert correction.strength == 0.5
    learned = [RECIPES[name].learned_rounding for name in ("balanced", "best")]
    assert learned == [LearnedRounding(steps=50), LearnedRounding(steps=200)]
    assert LearnedRounding(steps=1) == LearnedRounding(
        steps=1, windows=8, travels=(1.0, 0.25, 0.06, 0.0), scale_rate=1e-3
    )
