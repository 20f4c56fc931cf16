"""Matrices that were fused are split in the order that they have, which the base's weights show."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_pipeline.checkpoint.lazy import SINGLE_SHARD, Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.writer import write_checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.qwen.layers import head_geometry
from qwen_pipeline.qwen.settle import require_settled, settle
from qwen_pipeline.transforms.fine_tune.adopt import adopt
from qwen_pipeline_tests.in_memory import blocks_of, read_in_blocks
from qwen_pipeline_tests.layouts import Tensors, fused_copy, fused_projections, layouts_of
from qwen_pipeline_tests.oracles import language_logits
from qwen_pipeline_tests.tiny import LANGUAGE_FAMILIES, load_tiny, tiny_model, tiny_qwen2, tiny_qwen3


def trained(base: Path, root: Path, *, step: float = 0.05) -> Path:
    """Copy a model, whose weights have a deviation of 0.1, with other weights, as a training leaves them."""
    shutil.copytree(base, root)
    torch.manual_seed(7)
    tensors = load_file(root / SINGLE_SHARD)
    moved = {name: (t + step * torch.randn(t.shape)).to(t.dtype) for name, t in tensors.items()}
    save_file(moved, root / SINGLE_SHARD, metadata={"format": "pt"})
    return root


def rewritten(source: Path, root: Path, tensors: Tensors) -> Path:
    shutil.copytree(source, root)
    save_file({name: t.contiguous() for name, t in tensors.items()}, root / SINGLE_SHARD, metadata={"format": "pt"})
    return root


def logits(checkpoint: Checkpoint, root: Path) -> torch.Tensor:
    root.mkdir()
    write_checkpoint(checkpoint, root, task="test")
    return language_logits(load_tiny(root, torch.float64))


@pytest.mark.parametrize("family", LANGUAGE_FAMILIES)
def test_logits_of_a_model_whose_matrices_were_fused_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    layout = "mtp" if "mtp" in layouts_of(family) else "saved"
    base = tiny_model(family, tmp_path / "base", layout=layout)
    tuned = trained(base, tmp_path / "tuned")
    before, parent = open_checkpoint(tuned), open_checkpoint(base)
    expected = language_logits(load_tiny(tuned, torch.float64))
    groups = head_geometry(before.config)[1]
    for number, (of_heads, is_swapped) in enumerate(((1, False), (groups, True))):
        child = open_checkpoint(fused_copy(tuned, tmp_path / f"fused-{number}", groups=of_heads, is_swapped=is_swapped))
        assert len(child) < len(before)
        adopted = adopt(parent, child)
        assert {name: spec.shape for name, spec in adopted.checkpoint.items()} == {
            name: spec.shape for name, spec in before.items()
        }
        assert torch.equal(logits(adopted.checkpoint, tmp_path / f"out-{number}"), expected)
        (remark,) = [remark for remark in adopted.remarks if remark.startswith("self_attn.qkv_proj")]
        order = "q_proj, k_proj, v_proj"
        assert f"its rows are {order}{' of one group of heads' if of_heads > 1 else ', as the base'}" in remark
        assert not adopted.settled.split

    alone = settle(open_checkpoint(fused_copy(tuned, tmp_path / "alone")))
    assert alone.split
    assert torch.equal(logits(alone.checkpoint, tmp_path / "split"), expected)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_5_moe"])
def test_split_matrices_have_the_same_bytes_in_blocks_of_any_size(family: str, tmp_path: Path) -> None:
    base = tiny_model(family, tmp_path / "base")
    tuned = trained(base, tmp_path / "tuned")
    child = open_checkpoint(fused_copy(tuned, tmp_path / "fused", groups=2))
    adopted, expected = adopt(open_checkpoint(base), child).checkpoint, load_file(tuned / SINGLE_SHARD)
    for name in adopted:
        with blocks_of(adopted[name].row_bytes):
            assert torch.equal(read_in_blocks(adopted, name), expected[name])


def test_an_order_that_the_base_does_not_show_is_refused_copy(tmp_path: Path) -> None:
    base, other = tiny_qwen3(tmp_path / "base"), tiny_qwen3(tmp_path / "other", seed=5)
    with pytest.raises(CheckpointRefused, match=r"layers\.0\.mlp\.gate_up_proj\.weight holds 2 matrices") as refusal:
        adopt(open_checkpoint(base), open_checkpoint(fused_copy(other, tmp_path / "fused")))
    assert "not close to the base's, neither in the order gate_proj, up_proj, nor in" in str(refusal.value)
    tuned = trained(base, tmp_path / "tuned")
    one, two = (fused_projections(load_file(tuned / SINGLE_SHARD), groups=groups) for groups in (1, 2))
    mixed = rewritten(
        tuned, tmp_path / "mixed", {name: two[name] if "layers.1." in name else t for name, t in one.items()}
    )
    with pytest.raises(CheckpointRefused, match=r"not that of other layers: \S+0\.self_attn\S+, \S+1\.self_attn"):
        adopt(open_checkpoint(base), open_checkpoint(mixed))


def test_one_layer_that_training_began_anew_has_the_order_of_the_others(tmp_path: Path) -> None:
    base = tiny_qwen2(tmp_path / "base")
    tuned = trained(base, tmp_path / "tuned")
    tensors = load_file(tuned / SINGLE_SHARD)
    tensors |= {name: torch.randn(t.shape).to(t.dtype) for name, t in tensors.items() if "layers.0.self" in name}
    anew = rewritten(tuned, tmp_path / "anew", tensors)
    adopted = adopt(open_checkpoint(base), open_checkpoint(fused_copy(anew, tmp_path / "fused", groups=2))).checkpoint
    assert all(torch.equal(adopted.load(name), tensor) for name, tensor in tensors.items())


def test_parts_of_other_sizes_or_stored_twice_are_refused_copy(tmp_path: Path) -> None:
    base = tiny_qwen2(tmp_path / "base")
    whole = fused_projections(load_file(base / SINGLE_SHARD))
    name = "model.layers.1.mlp.gate_up_proj.weight"
    cut = open_checkpoint(rewritten(base, tmp_path / "cut", whole | {name: whole[name][:-1]}))
    with pytest.raises(
        CheckpointRefused, match=re.escape(f"{name} has 191 rows, but by the config its parts have 192")
    ):
        settle(cut)
    up = "model.layers.1.mlp.up_proj.weight"
    twice = open_checkpoint(rewritten(base, tmp_path / "twice", {up: whole[name][:96].clone(), **whole}))
    with pytest.raises(CheckpointRefused, match=re.escape(f"{up} is stored, and a part of {name} too")):
        settle(twice)
    wider = open_checkpoint(fused_copy(tiny_qwen2(tmp_path / "wider", hidden_size=128), tmp_path / "fused"))
    with pytest.raises(CheckpointRefused, match=r"\[\d+, 128\], but \[\d+, 64\] in the base"):
        adopt(open_checkpoint(base), wider)


def test_a_stage_that_writes_no_config_asks_for_padding_first(tmp_path: Path) -> None:
    root = fused_copy(tiny_qwen2(tmp_path / "base"), tmp_path / "fused")
    with pytest.raises(CheckpointRefused, match=r"qkv_proj split \(4 tensors\): its rows are q_proj, k_proj, v_proj"):
        require_settled(open_checkpoint(root))
