"""Padding: Qwen's published procedure bit for bit, and the live model's function exactly."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qwen_pipeline.checkpoint import digest
from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor, open_checkpoint
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.checkpoint.writer import write_checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.qwen.geometry import PadPlan, dump_plan, load_plan, plan_padding
from qwen_pipeline.qwen.padding_spec import Layout
from qwen_pipeline.transforms.padding.pad import pad, unpad
from qwen_pipeline.transforms.padding.splitting import choose_splits
from qwen_pipeline_tests.in_memory import read_in_blocks
from qwen_pipeline_tests.layouts import Layout as DiskLayout
from qwen_pipeline_tests.layouts import layouts_of
from qwen_pipeline_tests.tiny import LANGUAGE_FAMILIES, VOCABULARY, load_tiny, tiny_model, tiny_qwen2


def published_rows(weight: torch.Tensor, pad_size: int) -> torch.Tensor:
    """Qwen's procedure for gate_proj and up_proj: r0, 0, r1, 0, ..., r[pad_size - 1], 0, then the rest."""
    zero = torch.zeros_like(weight[:1])
    woven = [part for row in range(pad_size) for part in (weight[row : row + 1], zero)]
    return torch.cat([*woven, weight[pad_size:]], dim=0)


def published_columns(weight: torch.Tensor, pad_size: int) -> torch.Tensor:
    """The same for down_proj, along the columns."""
    zero = torch.zeros_like(weight[:, :1])
    woven = [part for column in range(pad_size) for part in (weight[:, column : column + 1], zero)]
    return torch.cat([*woven, weight[:, pad_size:]], dim=1)


def mlp(width: int, hidden: int, *, biases: bool = False) -> Checkpoint:
    """One layer of random MLP weights, in memory."""
    prefix = "model.layers.0.mlp."
    shapes = {
        "gate_proj.weight": (width, hidden),
        "up_proj.weight": (width, hidden),
        "down_proj.weight": (hidden, width),
    }
    shapes |= {"gate_proj.bias": (width,), "up_proj.bias": (width,), "down_proj.bias": (hidden,)} if biases else {}
    config = {"model_type": "qwen2", "intermediate_size": width}
    return random_checkpoint({prefix + name: shape for name, shape in shapes.items()}, config, hidden, seed=width)


def stack(width: int, hidden: int, experts: int, *, transposed: bool) -> Checkpoint:
    """One layer of random experts in stacks, in memory."""
    shapes = {"gate_up_proj": (experts, 2 * width, hidden), "down_proj": (experts, hidden, width)}
    if transposed:
        shapes = {name: (experts, inputs, outputs) for name, (_, outputs, inputs) in shapes.items()}
    config = {"model_type": "qwen3_moe", "moe_intermediate_size": width, "num_experts": experts}
    names = {f"model.layers.0.mlp.experts.{name}": shape for name, shape in shapes.items()}
    return random_checkpoint(names, config, hidden, seed=width)


def random_checkpoint(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], hidden: int, *, seed: int
) -> Checkpoint:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    return Checkpoint(
        config={**config, "num_hidden_layers": 1, "hidden_size": hidden},
        tensors={name: lazy(tensor) for name, tensor in tensors.items()},
        shards=dict.fromkeys(tensors, "model.safetensors"),
    )


def lazy(tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor(
        spec=TensorSpec(dtype="BF16", shape=tuple(tensor.shape)), read=lambda start, stop: tensor[start:stop]
    )


def test_29568_becomes_29696_bit_for_bit_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    live = mlp(29568, 64)
    plan = plan_padding(live.config, group_size=128, tensor_parallel=8)
    padded = pad(live, plan)
    monkeypatch.setattr(digest, "BLOCK_BYTES", 100_000)  # blocks that begin and end anywhere among the woven rows

    assert padded.config == {**live.config, "intermediate_size": 29696}
    assert padded.config["hidden_size"] == 64
    for name in live:
        procedure = published_columns if "down_proj" in name else published_rows
        expected = procedure(live.load(name), 128)
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
    live = mlp(width, 3, biases=True)
    assert_both_ways(live, plan_padding(live.config, group_size=group_size, tensor_parallel=tensor_parallel,
                                        layout=layout), block)  # fmt: skip


@given(
    width=st.integers(1, 40),
    tensor_parallel=st.integers(1, 5),
    layout=st.sampled_from(get_args(Layout)),
    experts=st.integers(1, 4),
    transposed=st.booleans(),
    block=st.sampled_from([1, 10_000]),
)
def test_unpadding_undoes_padding_of_stacks(
    width: int, tensor_parallel: int, layout: Layout, experts: int, transposed: bool, block: int
) -> None:
    live = stack(width, 257, experts, transposed=transposed)  # no width that could be taken for the hidden size
    assert_both_ways(
        live, plan_padding(live.config, group_size=4, tensor_parallel=tensor_parallel, layout=layout), block
    )


def assert_both_ways(live: Checkpoint, plan: PadPlan, block: int) -> None:
    """Pad and unpad, in blocks of ``block`` bytes and by the plan as a manifest holds it."""
    plan = choose_splits(live, plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "BLOCK_BYTES", block)
        padded = in_memory(pad(live, plan))
        back = in_memory(unpad(padded, load_plan(json.loads(json.dumps(dump_plan(plan))))))

    (size,) = plan.sizes
    assert padded.config == {**live.config, size.field: size.padded}
    assert back.config == live.config
    assert back.keys() == padded.keys() == live.keys()
    for name, spec in live.items():
        assert back[name] == spec
        assert torch.equal(back.load(name).view(torch.int16), live.load(name).view(torch.int16)), name


def in_memory(checkpoint: Checkpoint) -> Checkpoint:
    read = {name: read_in_blocks(checkpoint, name) for name in checkpoint}
    assert all(read[name].shape == spec.shape for name, spec in checkpoint.items())
    return checkpoint.replace(tensors={name: lazy(tensor) for name, tensor in read.items()})


@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("touched", ["up_proj", "down_proj"])
def test_what_was_changed_after_padding_is_not_unpadded(layout: Layout, touched: str) -> None:
    live = mlp(6, 3)
    plan = choose_splits(live, plan_padding(live.config, group_size=4, tensor_parallel=2, layout=layout))
    padded = in_memory(pad(live, plan))
    name = f"model.layers.0.mlp.{touched}.weight"
    changed = padded.load(name) + torch.randn(padded[name].shape).bfloat16()
    unpadded = unpad(padded.replace(tensors={name: lazy(changed)}), plan)
    with pytest.raises(CheckpointRefused, match=f"{touched}.* no longer what padding made"):
        unpadded.load(name)


@pytest.mark.parametrize(
    ("family", "disk"), [(family, disk) for family in LANGUAGE_FAMILIES for disk in layouts_of(family)]
)
def test_float64_logits_stay(tmp_path: Path, family: str, disk: DiskLayout) -> None:
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
    model.set_experts_implementation("eager")  # the default, a grouped product, knows no float64
    ids = torch.randint(0, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(7))
    return model(input_ids=ids).logits


@pytest.mark.parametrize("sparse", [{"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}], ids=["step", "listed"])
def test_dense_layers_beside_mixtures_are_padded_and_routers_are_not(tmp_path: Path, sparse: dict[str, Any]) -> None:
    """A router lies beside its experts, where a dense layer has its projections."""
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
def test_more_new_channels_than_live_ones(tmp_path: Path, layout: Layout) -> None:
    root = tiny_qwen2(tmp_path / "live", intermediate_size=40, dtype=torch.float64)
    live = open_checkpoint(root)
    plan = choose_splits(live, plan_padding(live.config, group_size=32, tensor_parallel=4, layout=layout))
    (tmp_path / "padded").mkdir()
    write_checkpoint(pad(live, plan), tmp_path / "padded", task="pad")
    assert (float64_logits(tmp_path / "padded") - float64_logits(root)).abs().max() < 1e-12


def test_nothing_to_pad_leaves_the_checkpoint_as_it_is(tmp_path: Path) -> None:
    live = open_checkpoint(tiny_qwen2(tmp_path, intermediate_size=128))
    padded = pad(live, plan_padding(live.config, group_size=32, tensor_parallel=4))
    assert padded is live


@pytest.mark.parametrize("fault", ["missing", "width", "two spellings"])
def test_weights_that_do_not_fit_the_config_are_named(tmp_path: Path, fault: str) -> None:
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
