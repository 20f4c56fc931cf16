"""Repair in every format moves live codes and adds only zeros, compared with codes that are read bit by bit."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.errors import CheckpointRefused, InputRefused
from qwen_pipeline.evaluation.tensor_parallel.repair_proof import prove_repair
from qwen_pipeline.qwen.geometry import PaddedSize
from qwen_pipeline.qwen.layers import required
from qwen_pipeline.transforms.codes.formats import code_format
from qwen_pipeline.transforms.codes.repair import coarsest, plan_repair, repair, widenings
from qwen_pipeline_tests.codes import (
    METHODS,
    Codes,
    Method,
    Packing,
    read_codes,
    replace_mlps_by_codes,
    write_checkpoint_of_codes,
)
from qwen_pipeline_tests.in_memory import lazy
from qwen_pipeline_tests.tiny import tiny_model

pytestmark = pytest.mark.lengthy


@dataclass(frozen=True, slots=True)
class Case:
    packing: Packing
    before: Checkpoint
    after: Checkpoint
    size: PaddedSize

    def codes(self, checkpoint: Checkpoint, module: str) -> Codes:
        prefix = module + "."
        tensors = {name.removeprefix(prefix): checkpoint.load(name) for name in checkpoint if name.startswith(prefix)}
        return read_codes(self.packing, tensors)


@st.composite
def packings(draw: st.DrawFn) -> Packing:
    method = draw(st.sampled_from(METHODS))
    return Packing(
        method=method,
        bits=4 if method == "awq" else draw(st.sampled_from([4, 8])),
        group_size=draw(st.sampled_from([8, 16, 32])),
        sym=draw(st.booleans()),
        desc_act=method != "awq" and draw(st.booleans()),
    )


def repaired(root: Path, packing: Packing, *, groups: int, ranks: int, seed: int = 0) -> Case:
    write_checkpoint_of_codes(root, packing, width=groups * packing.group_size, seed=seed)
    before = open_checkpoint(root)
    form = code_format(before.config["quantization_config"])
    plan = plan_repair(before.config, form, tensor_parallel=ranks)
    return Case(packing, before, repair(before, form, plan), plan.sizes[0])


@given(packings(), st.integers(1, 5), st.sampled_from([1, 2, 4]), st.integers(0, 2**31))
@settings(max_examples=40)
def test_live_weights_keep_their_bits_and_added_ones_are_zero(
    packing: Packing, groups: int, ranks: int, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        case = repaired(Path(scratch) / "model", packing, groups=groups, ranks=ranks, seed=seed)
        positions = case.size.positions()
        for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            module = f"model.layers.0.mlp.{name}"
            before, after = (case.codes(checkpoint, module).weight for checkpoint in (case.before, case.after))
            expected = torch.zeros_like(after).index_copy_(axis, positions, before)
            assert after.shape[axis] == case.size.padded
            assert torch.equal(after, expected)
        bias = case.after.load("model.layers.0.mlp.gate_proj.bias")
        assert torch.equal(bias[positions], case.before.load("model.layers.0.mlp.gate_proj.bias"))
        assert bias.count_nonzero() == case.before.load("model.layers.0.mlp.gate_proj.bias").count_nonzero()
        assert torch.equal(case.after.load("model.norm.weight"), case.before.load("model.norm.weight"))
        assert case.after.config == {**case.before.config, "intermediate_size": case.size.padded}


@given(packings(), st.integers(1, 5), st.sampled_from([2, 4]), st.integers(0, 2**31), st.data())
@settings(max_examples=15)
def test_any_range_of_rows_equals_those_rows_of_the_whole(
    packing: Packing, groups: int, ranks: int, seed: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        case = repaired(Path(scratch) / "model", packing, groups=groups, ranks=ranks, seed=seed)
        for name in case.after:
            rows = case.after[name].rows
            start = data.draw(st.integers(0, rows))
            stop = data.draw(st.integers(start, rows))
            assert torch.equal(case.after.load(name, slice(start, stop)), case.after.load(name)[start:stop])


@given(st.integers(1, 300), st.integers(1, 64), st.sampled_from([32, 64, 128]))
def test_added_groups_are_spread_evenly_and_live_ones_stay_whole_and_in_order(
    groups: int, ranks: int, unit: int
) -> None:
    padded = -(-groups // ranks) * ranks
    size = PaddedSize(
        field="intermediate_size", places=(), live=groups * unit, padded=padded * unit, layout="groups", group_size=unit
    )
    positions = size.positions().reshape(groups, unit)
    assert torch.equal(positions - positions[:, :1], torch.arange(unit).expand(groups, unit))
    assert not (positions[:, 0] % unit).any()
    groups_of_rank = torch.bincount(positions[:, 0] // unit // (padded // ranks), minlength=ranks)
    assert groups_of_rank.max() - groups_of_rank.min() <= 1
    assert bool((size.positions().diff() > 0).all())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_moe", "qwen2_moe", "qwen3_next", "qwen3_omni_moe_thinker"])
def test_experts_shared_experts_and_decoders_beside_towers_are_repaired(tmp_path: Path, family: str) -> None:
    """Two ranks can share heads of 32 channels in ``o_proj``, but not widths of 3 and 5 groups of 32."""
    sizes: dict[str, Any] = {"head_dim": 32, "linear_value_head_dim": 32}
    packing = Packing(method="gptq", group_size=32)
    before = open_checkpoint(replace_mlps_by_codes(tiny_model(family, tmp_path / "model", **sizes), packing))
    form = code_format(before.config["quantization_config"])
    plan = plan_repair(before.config, form, tensor_parallel=2)
    after = repair(before, form, plan)
    widened = {module: by for size in plan.sizes for module, by in widenings(before, size).items()}
    packed = {name.removesuffix(".qweight") for name in before if name.endswith(".qweight")}
    assert widened.keys() == packed
    assert not prove_repair(before, after, form, widened, ranks=2).changed
    assert {by.size.padded - by.size.live for by in widened.values()} == {32}
    untouched = {name for name in before if name.rpartition(".")[0] not in packed}
    assert all(after.tensors[name] is before.tensors[name] for name in untouched)
    for size in plan.sizes:
        assert required(after.config, size.field) == size.padded


def test_a_single_added_group_is_appended() -> None:
    size = PaddedSize(field="intermediate_size", places=(), live=29568, padded=29696, layout="groups", group_size=128)
    assert torch.equal(size.positions(), torch.arange(29568))


def test_a_layer_that_was_not_quantized_is_widened_with_zeros(tmp_path: Path) -> None:
    packing = Packing(method="gptq")
    write_checkpoint_of_codes(tmp_path / "model", packing, width=48)
    quantized = open_checkpoint(tmp_path / "model")
    name, weight = "model.layers.0.mlp.down_proj.weight", torch.rand(32, 48)
    kept = {name: tensor for name, tensor in quantized.tensors.items() if ".down_proj." not in name}
    shards = dict.fromkeys([*kept, name], "model.safetensors")
    before = replace(quantized, tensors={**kept, name: lazy(weight)}, shards=shards)
    form = code_format(packing.settings)
    after = repair(before, form, plan_repair(before.config, form, tensor_parallel=2))
    assert torch.equal(after.load(name), torch.cat([weight, torch.zeros(32, 16)], dim=1))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bits": 8}, r"gate_proj.qzeros is \[2, 6\]"),
        ({"group_size": 8}, r"down_proj.qzeros is \[3, 4\]"),
        ({"quant_method": "awq", "version": "gemm"}, "gate_proj.g_idx is not a tensor of this format"),
    ],
)
def test_codes_that_do_not_fit_the_config_are_refused_by_name(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    packing = Packing(method="gptq")
    write_checkpoint_of_codes(tmp_path / "model", packing, width=48)
    before = open_checkpoint(tmp_path / "model")
    form = code_format(packing.settings | change)
    plan = plan_repair(before.config, form, tensor_parallel=4)
    with pytest.raises(CheckpointRefused, match=named):
        repair(before, form, plan)


def test_a_missing_tensor_is_refused_by_name(tmp_path: Path) -> None:
    packing = Packing(method="gptq")
    write_checkpoint_of_codes(tmp_path / "model", packing, width=48)
    whole = open_checkpoint(tmp_path / "model")
    tensors = {name: tensor for name, tensor in whole.tensors.items() if not name.endswith("up_proj.scales")}
    form = code_format(packing.settings)
    with pytest.raises(CheckpointRefused, match=r"up_proj\.scales is missing"):
        repair(replace(whole, tensors=tensors), form, plan_repair(whole.config, form, tensor_parallel=2))


@pytest.mark.parametrize(
    ("config", "what", "remedy"),
    [
        ({"intermediate_size": 40}, "40 is 2.5 groups of 16", "qwen-pipeline pad --group-size 16 --tp 4"),
        (
            {"num_attention_heads": 6, "num_key_value_heads": 6},
            "6 attention heads are not divisible by 4",
            r"1, 2, 3\b",
        ),
        ({"num_attention_heads": 32, "head_dim": 1}, "o_proj has 8 inputs per rank", "smaller groups"),
    ],
)
def test_models_that_added_groups_cannot_repair_are_refused_with_a_remedy_that_can(
    tmp_path: Path, config: dict[str, int], what: str, remedy: str
) -> None:
    packing = Packing(method="gptq")
    write_checkpoint_of_codes(tmp_path / "model", packing, width=48, config=config)
    before = open_checkpoint(tmp_path / "model")
    form = code_format(packing.settings)
    with pytest.raises(InputRefused, match=what) as refused:
        plan_repair(before.config, form, tensor_parallel=4)
    assert refused.match(remedy)


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
def test_layers_of_other_bits_and_groups_keep_them(tmp_path: Path, method: Method) -> None:
    """Gate and up have groups of 16, which decide on the width, and down has half of that."""
    packing, other = Packing(method=method, group_size=16), Packing(method=method, bits=8, group_size=8)
    write_checkpoint_of_codes(tmp_path / "model", packing, width=48)
    write_checkpoint_of_codes(tmp_path / "other", other, width=48)
    whole, others = open_checkpoint(tmp_path / "model"), open_checkpoint(tmp_path / "other")
    settings = packing.settings
    if method == "gptq":
        settings = {**settings, "dynamic": {r"+:.*\.down_proj$": {"bits": 8, "group_size": 8}}}
    before = whole.replace(
        tensors={name: others.tensors[name] for name in whole if ".down_proj." in name},
        config={**whole.config, "quantization_config": settings},
    )
    form = code_format(settings)
    plan = plan_repair(before.config, coarsest(before, form, mlps=True), tensor_parallel=4)
    after = repair(before, form, plan)
    (size,) = plan.sizes
    assert (size.padded, size.group_size) == (64, 16)
    for name, of, axis in (("gate_proj", packing, 0), ("down_proj", other, 1)):
        prefix = f"model.layers.0.mlp.{name}."
        old, new = (
            read_codes(of, {key.removeprefix(prefix): found.load(key) for key in found if key.startswith(prefix)})
            for found in (before, after)
        )
        expected = torch.zeros_like(new.weight).index_copy_(axis, size.positions(), old.weight)
        assert torch.equal(new.weight, expected)
    changed = widenings(before, size)
    assert not prove_repair(before, after, form, changed, ranks=4).changed
