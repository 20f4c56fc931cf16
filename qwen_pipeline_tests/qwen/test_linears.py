"""The linear layers of a checkpoint, found by name."""

from pathlib import Path

import pytest

from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor, open_checkpoint
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.linears import DECODER_LINEARS, decoder_linears
from qwen_pipeline_tests.tiny import tiny_qwen2, tiny_qwen3


@pytest.mark.parametrize("make", [tiny_qwen2, tiny_qwen3])
def test_each_layer_has_seven(tmp_path: Path, make: object) -> None:
    linears = decoder_linears(open_checkpoint(make(tmp_path / "model", shards=2)))  # pyright: ignore[reportCallIssue]
    assert [(linear.layer, linear.kind) for linear in linears] == [
        (i, kind) for i in (0, 1) for kind in DECODER_LINEARS
    ]
    gate = next(linear for linear in linears if linear.module == "model.layers.1.mlp.gate_proj")
    assert (gate.out_features, gate.in_features) == (96, 64)


def checkpoint_of(**shapes: tuple[int, ...]) -> Checkpoint:
    def unread(_: int, __: int) -> None:
        raise AssertionError("names and shapes decide")

    tensors = {
        name.replace("__", "."): LazyTensor(spec=TensorSpec(dtype="BF16", shape=shape), read=unread)  # pyright: ignore[reportArgumentType]
        for name, shape in shapes.items()
    }
    return Checkpoint(config={}, tensors=tensors, shards=dict.fromkeys(tensors, "model.safetensors"))


def test_experts_are_refused_by_name() -> None:
    with pytest.raises(InputRefused, match=r"layers\.0\.mlp\.experts\.3\.up_proj\.weight \[8, 4\]"):
        decoder_linears(checkpoint_of(model__layers__0__mlp__experts__3__up_proj__weight=(8, 4)))


def test_missing_layers_are_named() -> None:
    with pytest.raises(InputRefused, match=r"layers\.0\.self_attn\.k_proj"):
        decoder_linears(checkpoint_of(model__layers__0__self_attn__q_proj__weight=(8, 8)))
    with pytest.raises(InputRefused, match="all of them"):
        decoder_linears(checkpoint_of(lm_head__weight=(8, 8)))
