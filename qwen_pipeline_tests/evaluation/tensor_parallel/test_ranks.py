"""The shards of ranks, compared with integer codes sliced one rank and one weight at a time."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.evaluation.tensor_parallel.ranks import weight_over_ranks
from qwen_pipeline.transforms.codes.formats import code_format
from qwen_pipeline.transforms.codes.repair import plan_repair, repair
from qwen_pipeline_tests.codes import METHODS, Codes, Method, Packing, write_checkpoint_of_codes

DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"


def weight_by_loops(layer: Codes, group_size: int, ranks: int) -> torch.Tensor:
    """Return the weight of a layer whose inputs ranks share, float64 [O, I of all ranks]."""
    inputs, groups = len(layer.codes) // ranks // 8 * 8, len(layer.scales) // ranks
    columns: list[list[float]] = []
    for rank in range(ranks):
        for i in range(inputs):
            local_group = min(i // group_size, groups - 1)
            g, codes = rank * groups + local_group, layer.codes[rank * inputs + i]
            columns.append([float(layer.scales[g, o]) * (codes[o] - layer.zeros[g][o]) for o in range(len(codes))])
    return torch.tensor(columns, dtype=torch.float64).T


@given(st.sampled_from(METHODS), st.booleans(), st.integers(4, 9), st.sampled_from([2, 4]), st.integers(0, 2**31))
@settings(max_examples=25)
def test_a_rank_scales_its_inputs_by_the_groups_it_took(
    method: Method, sym: bool, groups: int, ranks: int, seed: int
) -> None:
    packing = Packing(method=method, sym=sym, group_size=16)
    with tempfile.TemporaryDirectory() as scratch:
        layers = write_checkpoint_of_codes(Path(scratch) / "model", packing, width=16 * groups, seed=seed)
        checkpoint = open_checkpoint(Path(scratch) / "model")
        packed = code_format(packing.settings).load(checkpoint, DOWN)
        held = weight_over_ranks(packed, "in", ranks)
        assert torch.equal(held.read(0, held.spec.rows).double(), weight_by_loops(layers[DOWN], 16, ranks))


@pytest.mark.parametrize("method", METHODS)
def test_ranks_are_correct_after_repair_and_wrong_before(tmp_path: Path, method: Method) -> None:
    packing = Packing(method=method, group_size=16, sym=False)
    layers = write_checkpoint_of_codes(tmp_path / "model", packing, width=48)
    before, form = open_checkpoint(tmp_path / "model"), code_format(packing.settings)
    plan = plan_repair(before.config, form, tensor_parallel=2)
    after = repair(before, form, plan)
    wrong = weight_over_ranks(form.load(before, DOWN), "in", 2).read(0, 32)
    right = weight_over_ranks(form.load(after, DOWN), "in", 2).read(0, 32)
    assert wrong.shape == (32, 48)
    assert not torch.equal(wrong.double(), layers[DOWN].weight)
    assert torch.equal(right[:, :48].double(), layers[DOWN].weight)
    assert not right[:, 48:].any()


def test_outputs_are_sharded_without_change(tmp_path: Path) -> None:
    packing = Packing(method="gptq", group_size=16)
    layers = write_checkpoint_of_codes(tmp_path / "model", packing, width=64)
    held = weight_over_ranks(code_format(packing.settings).load(open_checkpoint(tmp_path / "model"), UP), "out", 4)
    assert torch.equal(held.read(0, 64).double(), layers[UP].weight)
    assert torch.equal(held.read(10, 50).double(), layers[UP].weight[10:50])


@pytest.mark.parametrize("ranks", [2, 4])
def test_act_order_is_correct_if_every_rank_has_every_scale(tmp_path: Path, ranks: int) -> None:
    packing = Packing(method="gptq", group_size=16, sym=False, desc_act=True)
    layers = write_checkpoint_of_codes(tmp_path / "model", packing, width=64)
    held = weight_over_ranks(code_format(packing.settings).load(open_checkpoint(tmp_path / "model"), DOWN), "in", ranks)
    assert torch.equal(held.read(0, 32).double(), layers[DOWN].weight)


def test_three_ranks_lose_inputs_of_a_width_that_three_does_not_divide(tmp_path: Path) -> None:
    packing = Packing(method="gptq", group_size=16)
    write_checkpoint_of_codes(tmp_path / "model", packing, width=80)
    held = weight_over_ranks(code_format(packing.settings).load(open_checkpoint(tmp_path / "model"), DOWN), "in", 3)
    assert held.spec.shape == (32, 72)
