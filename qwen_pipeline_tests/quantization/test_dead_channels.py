"""Dead channels must not change how live channels are quantized: on matrices, and in the installed libraries."""

import json
import os
import subprocess
from typing import Any

import pytest
import torch

from qwen_pipeline.quantization.dead_channels import settle_dead_channels
from qwen_pipeline.workers.environments import find_environment
from qwen_pipeline_tests import REPOSITORY


def test_dead_channels_get_the_mean_diagonal_and_zero_weights() -> None:
    hessian = torch.tensor([[0.01, 0.002, 0.0], [0.002, 0.03, 0.0], [0.0, 0.0, 0.0]])
    weight = torch.ones(2, 3)
    settle_dead_channels(hessian, weight)
    assert hessian.diagonal().tolist() == pytest.approx([0.01, 0.03, 0.02])
    assert hessian.mean(dim=0)[:2].tolist() == pytest.approx([0.004, 0.032 / 3])
    assert weight.tolist() == [[1, 1, 0], [1, 1, 0]]


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_nothing_changes_if_no_or_all_channels_are_dead(value: float) -> None:
    hessian, weight = torch.eye(3) * value, torch.ones(2, 3)
    settle_dead_channels(hessian, weight)
    assert torch.equal(hessian, torch.eye(3) * value)
    assert torch.equal(weight, torch.ones(2, 3))


@pytest.mark.gpu
def test_autogptq_keeps_the_codes_of_live_channels() -> None:
    command = [find_environment("autogptq").python, "-m", "qwen_pipeline_tests.quantization.dead_channels_in_autogptq"]
    printed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    unpatched, settled = json.loads(printed.stdout.splitlines()[-1])
    assert unpatched > 0.1
    assert settled < 1e-3


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    engine = find_environment("gptqmodel")
    printed = subprocess.run(
        [engine.python, "-m", "qwen_pipeline_tests.quantization.dead_channels_in_gptqmodel"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True, env=os.environ | {"GPTQMODEL_CPU_WORKERS": "2"},
    )  # fmt: skip
    return json.loads(printed.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize("act_group_aware", [False, True])
def test_codes_of_live_channels_equal_those_without_padding(found: dict[str, Any], act_group_aware: bool) -> None:
    settled = found[f"settled, {act_group_aware}"]
    assert settled["changed"] < 1e-3  # sums over another number of inputs may round differently
    assert settled["dead are zero"]


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize("act_group_aware", [False, True])
def test_without_the_patch_padding_costs_accuracy(found: dict[str, Any], act_group_aware: bool) -> None:
    """If this fails, GPTQModel treats dead channels differently: check whether the patch is still needed."""
    library = found[f"unpatched, {act_group_aware}"]
    assert library["padded error"] > 1.2 * library["live error"]
    assert library["changed"] > 0.1
