"""Padding reproduces Qwen's published procedure bit for bit, and keeps the live model's function exactly."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.writer import write_checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.qwen.geometry import PadPlan, dump_plan, load_plan, plan_padding
from qwen_pipeline.qwen.padding_spec import Layout
from qwen_pipeline.transforms.padding.pad import pad, unpad
from qwen_pipeline.transforms.padding.splitting import choose_splits
from qwen_pipeline_tests.in_memory import blocks_of, lazy, loaded, random_mlp, random_stack, read_in_blocks
from qwen_pipeline_tests.layouts import Layout as DiskLayout
from qwen_pipeline_tests.layouts import layouts_of
from qwen_pipeline_tests.tiny import LANGUAGE_FAMILIES, VOCABULARY, load_tiny, tiny_model, tiny_qwen2

pytestmark = pytest.mark.lengthy


def published_rows(weight: torch.Tensor, pad_size: int) -> torch.Tensor:
    """Apply Qwen's procedure for gate_proj and up_proj: r0, 0, r1, 0, ..., r[pad_size - 1], 0, then the rest."""
    zero = torch.zeros_like(weight[:1])
    interleaved = [part for row in range(pad_size) for part in (weight[row : row + 1], zero)]
    return torch.cat([*interleaved, weight[pad_size:]], dim=0)


def published_columns(weight: torch.Tensor, pad_size: int) -> torch.Tensor:
    """Apply the same procedure to the columns, for down_proj."""
    zero = torch.zeros_like(weight[:, :1])
    interleaved = [part for column in range(pad_size) for part in (weight[:, column : column + 1], zero)]
    return torch.cat([*interleaved, weight[:, pad_size:]], dim=1)


def test_29568_becomes_29696_bit_for_bit_as_published() -> None:
    live = random_mlp(29568, 64)
    plan = plan_padding(live.config, group_size=128, tensor_parallel=8)
    padded = pad(live, plan)
    assert padded.config == {**live.config, "intermediate_size": 29696}
    assert padded.config["hidden_size"] == 64
    for name in live:
        procedure = published_columns if "down_proj" in name else published_rows
        expected = procedure(live.load(name), 128)
        with blocks_of(100_000):  # blocks that begin and end anywhere among the interleaved rows
            found = read_in_blocks(padded, name)
        assert found.dtype == expected.dtype
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16)), name


@given(
    width=st.integers(1, 80),
    group_size=st.sampled_from([2, 4, 16]),
    tensor_parallel=st.integers(1, 5),
    layout=st.sampled_from(get_args(Layout)),
    block=st.sampled_from([1, 200, 10_000]),
)
def test_unpadding_undoes_padding(
    width: int, group_size: int, tensor_parallel: int, layout: Layout, block: int
) -> None:
    live = random_mlp(width, 3, biases=True)
    plan = plan_padding(live.config, group_size=group_size, tensor_parallel=tensor_parallel, layout=layout)
    assert_round_trip(live, plan, block)


@given(
    width=st.integers(1, 40),
    tensor_parallel=st.integers(1, 5),
    layout=st.sampled_from(get_args(Layout)),
    experts=st.integers(1, 4),
    transposed=st.booleans(),
    block=st.sampled_from([1, 10_000]),
)
def test_unpadding_undoes_padding_of_stacked_experts(
    width: int, tensor_parallel: int, layout: Layout, experts: int, transposed: bool, block: int
) -> None:
    live = random_stack(width, 257, experts, transposed=transposed)  # no width equals the hidden size
    plan = plan_padding(live.config, group_size=4, tensor_parallel=tensor_parallel, layout=layout)
    assert_round_trip(live, plan, block)


def assert_round_trip(live: Checkpoint, plan: PadPlan, block: int) -> None:
    """Pad and unpad in blocks of ``block`` bytes, with the plan as it is stored in a manifest."""
    plan = choose_splits(live, plan)
    with blocks_of(block):
        padded = loaded(pad(live, plan))
        back = loaded(unpad(padded, load_plan(json.loads(json.dumps(dump_plan(plan))))))

    (size,) = plan.sizes
    assert padded.config == {**live.config, size.field: size.padded}
    assert back.config == live.config
    assert back.keys() == padded.keys() == live.keys()
    for name, spec in live.items():
        assert back[name] == spec
        assert torch.equal(back.load(name).view(torch.int16), live.load(name).view(torch.int16)), name


@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("touched", ["up_proj", "down_proj"])
def test_a_checkpoint_that_was_changed_after_padding_is_not_unpadded(layout: Layout, touched: str) -> None:
    live = random_mlp(6, 3)
    plan = choose_splits(live, plan_padding(live.config, group_size=4, tensor_parallel=2, layout=layout))
    padded = loaded(pad(live, plan))
    name = f"model.layers.0.mlp.{touched}.weight"
    changed = padded.load(name) + torch.randn(padded[name].shape).bfloat16()
    unpadded = unpad(padded.replace(tensors={name: lazy(changed)}), plan)
    with pytest.raises(CheckpointRefused, match=f"{touched}.* was changed after padding"):
        unpadded.load(name)


@pytest.mark.parametrize(
    ("family", "disk"),
    [
        pytest.param(family, disk, marks=[pytest.mark.slow] * (disk != "saved"))
        for family in LANGUAGE_FAMILIES
        for disk in layouts_of(family)
    ],
)
def test_float64_logits_are_unchanged(tmp_path: Path, family: str, disk: DiskLayout) -> None:
    root = tiny_model(family, tmp_path / "live", dtype=torch.float64, layout=disk)
    live = open_checkpoint(root)
    expected = float64_logits(root)
    for layout in get_args(Layout):
        plan = choose_splits(live, plan_padding(live.config, group_size=32, tensor_parallel=4, layout=layout))
        assert all(size.zeros for size in plan.sizes)
        (out := tmp_path / layout).mkdir()
        write_checkpoint(pad(live, plan), out, task="pad")
        assert (float64_logits(out) - expected).abs().max() < 1e-12


@torch.inference_mode()
def float64_logits(root: Path) -> torch.Tensor:
    model = load_tiny(root, torch.float64)
    model.set_experts_implementation("eager")  # the default, a grouped matrix product, does not support float64
    ids = torch.randint(0, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(7))
    return model(input_ids=ids).logits


@pytest.mark.parametrize("sparse", [{"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}], ids=["step", "listed"])
def test_dense_layers_beside_mixtures_are_padded_and_routers_are_not(tmp_path: Path, sparse: dict[str, Any]) -> None:
    """A router's module path has the form of a dense layer's projection."""
    root = tiny_model("qwen2_moe", tmp_path / "live", dtype=torch.float64, **sparse)
    live = open_checkpoint(root)
    plan = plan_padding(live.config, group_size=32, tensor_parallel=4)
    assert [size.field for size in plan.sizes if size.zeros] == [
        "intermediate_size",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
    ]
    (tmp_path / "padded").mkdir()
    write_checkpoint(pad(live, plan), tmp_path / "padded", task="pad")
    assert (float64_logits(tmp_path / "padded") - float64_logits(root)).abs().max() < 1e-12


@pytest.mark.parametrize("layout", get_args(Layout))
def test_there_may_be_more_added_channels_than_live_ones(tmp_path: Path, layout: Layout) -> None:
    root = tiny_qwen2(tmp_path / "live", intermediate_size=40, dtype=torch.float64)
    live = open_checkpoint(root)
    plan = choose_splits(live, plan_padding(live.config, group_size=32, tensor_parallel=4, layout=layout))
    (tmp_path / "padded").mkdir()
    write_checkpoint(pad(live, plan), tmp_path / "padded", task="pad")
    assert (float64_logits(tmp_path / "padded") - float64_logits(root)).abs().max() < 1e-12


def test_with_nothing_to_pad_the_checkpoint_is_returned_unchanged(tmp_path: Path) -> None:
    live = open_checkpoint(tiny_qwen2(tmp_path, intermediate_size=128))
    padded = pad(live, plan_padding(live.config, group_size=32, tensor_parallel=4))
    assert padded is live


@pytest.mark.parametrize("fault", ["missing", "width", "two spellings"])
def test_weights_that_do_not_fit_the_config_are_refused_by_name(tmp_path: Path, fault: str) -> None:
    root = tiny_qwen2(tmp_path)
    checkpoint = open_checkpoint(root)
    tensors = {name: checkpoint.load(name) for name in checkpoint}
    name = "model.layers.1.mlp.up_proj.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "width":
        tensors[name] = tensors[name][:-1].contiguous()
    else:
        tensors[name.replace("model.", "model.language_model.", 1)] = tensors[name].clone()
    save_file(tensors, root / "model.safetensors")
    plan = plan_padding(checkpoint.config, group_size=32, tensor_parallel=2)
    with pytest.raises(CheckpointRefused, match=r"layers\.1\.mlp\.up_proj\.weight"):
        pad(open_checkpoint(root), plan)
