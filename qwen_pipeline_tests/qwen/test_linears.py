"""The linear layers of a checkpoint and their weights, experts in stacks included."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.qwen.linears import decoder_linears, load_weight
from qwen_pipeline_tests.layouts import Layout, layouts_of
from qwen_pipeline_tests.tiny import DENSE_LINEARS, LANGUAGE_FAMILIES, tiny_model, tiny_qwen2, tiny_qwen3

MIXTURES = [(f, layout) for f in LANGUAGE_FAMILIES for layout in layouts_of(f) if layout in ("fused", "transposed")]


@pytest.mark.parametrize("make", [tiny_qwen2, tiny_qwen3])
def test_each_dense_layer_has_seven(tmp_path: Path, make: object) -> None:
    linears = decoder_linears(open_checkpoint(make(tmp_path / "model", shards=2)))  # pyright: ignore[reportCallIssue]
    assert [(linear.layer, linear.kind) for linear in linears] == [(i, kind) for i in (0, 1) for kind in DENSE_LINEARS]
    gate = next(linear for linear in linears if linear.module == "model.layers.1.mlp.gate_proj")
    assert (gate.out_features, gate.in_features) == (96, 64)


@pytest.mark.parametrize(("family", "layout"), MIXTURES)
def test_a_view_of_a_stack_is_the_expert_that_lies_alone_in_another_layout(
    family: str, layout: Layout, tmp_path: Path
) -> None:
    alone = open_checkpoint(tiny_model(family, tmp_path / "saved"))
    stacked = open_checkpoint(tiny_model(family, tmp_path / "stacked", layout=layout))
    linears = decoder_linears(stacked)
    assert [at.module for at in linears] == [at.module for at in decoder_linears(alone)]
    assert sum("experts." in at.kind for at in linears) == 2 * 4 * 3
    for ours, theirs in zip(linears, decoder_linears(alone), strict=True):
        weight = load_weight(stacked, ours)
        assert weight.shape == (ours.out_features, ours.in_features)
        assert torch.equal(weight, load_weight(alone, theirs))
        assert torch.equal(load_weight(stacked, ours, slice(3, 9)), weight[3:9])


def test_routers_gates_and_small_projections_stay_in_full_precision(tmp_path: Path) -> None:
    kinds = {at.kind for at in decoder_linears(open_checkpoint(tiny_model("qwen3_next", tmp_path)))}
    assert {"linear_attn.in_proj_qkvz", "linear_attn.out_proj", "mlp.shared_expert.down_proj"} < kinds
    assert not kinds & {"mlp.gate", "mlp.shared_expert_gate", "linear_attn.in_proj_ba"}


def test_what_is_missing_or_misshapen_is_named(tmp_path: Path) -> None:
    sound = open_checkpoint(tiny_model("qwen3_moe", tmp_path))
    with pytest.raises(CheckpointRefused, match=r"layers\.1\.mlp\.experts\.2\.up_proj is missing"):
        decoder_linears(without(sound, "model.layers.1.mlp.experts.2.up_proj.weight"))
    wider = replace(sound, config={**sound.config, "moe_intermediate_size": 128})
    with pytest.raises(CheckpointRefused, match=r"gate_proj\.weight is \[96, 64\], expected 128 x 64 for"):
        decoder_linears(wider)


def test_a_checkpoint_without_layers_is_refused(tmp_path: Path) -> None:
    sound = open_checkpoint(tiny_qwen2(tmp_path))
    with pytest.raises(CheckpointRefused, match="no tensor of a decoder layer"):
        decoder_linears(without(sound, *(name for name in sound if "layers" in name)))


def without(checkpoint: Checkpoint, *names: str) -> Checkpoint:
    kept = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in names}
    return Checkpoint(config=checkpoint.config, tensors=kept, shards=dict.fromkeys(kept, "model.safetensors"))
