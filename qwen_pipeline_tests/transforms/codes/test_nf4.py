"""QLoRA's rounding: the bytes of bitsandbytes, read in any blocks, and a slow implementation for ties."""

from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.errors import InputRefused, QuantizedInputRefused
from qwen_pipeline.qwen.linears import decoder_linears
from qwen_pipeline.transforms.codes.nf4 import QUANTILES, Statistics, rounded_to_nf4
from qwen_pipeline_tests.in_memory import checkpoint_of
from qwen_pipeline_tests.rounding import round_to_codes
from qwen_pipeline_tests.tiny import tiny_model, tiny_qwen2
from qwen_pipeline_tests.transforms.codes.nf4_of_bitsandbytes import SHAPES

GOLDEN = load_file(Path(__file__).with_name("nf4_of_bitsandbytes.safetensors"))


@pytest.mark.parametrize("statistics", get_args(Statistics))
@pytest.mark.parametrize("case", SHAPES)
def test_every_block_of_rows_has_the_bytes_of_bitsandbytes(case: str, statistics: Statistics) -> None:
    weight, expected = GOLDEN[f"{case}/weight"], GOLDEN[f"{case}/{statistics}"]
    rounded = _rounded(weight, statistics)
    bounds = [0, 1, 8, 21, len(weight)]
    blocks = [rounded.load("model.layers.0.mlp.up_proj.weight", slice(*rows)) for rows in pairwise(bounds)]
    assert torch.equal(torch.cat(blocks).view(torch.uint8), expected.view(torch.uint8))
    assert not torch.equal(expected, weight)


def test_each_value_is_the_nearest_quantile_of_its_block() -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    found = _rounded(weight, "single").load("model.layers.0.mlp.up_proj.weight")
    for row, restored in zip(weight.double(), found.double(), strict=True):
        largest = max(abs(value) for value in row.tolist())
        for value, other in zip(row.tolist(), restored.tolist(), strict=True):
            nearest = min(QUANTILES, key=lambda quantile: abs(quantile - value / largest))
            assert abs(other - nearest * largest) < 1e-6


def test_a_block_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 64)
    assert not _rounded(weight, "single").load("model.layers.0.mlp.up_proj.weight").any()


def test_the_decoders_linear_layers_are_rounded_and_nothing_else(tmp_path: Path) -> None:
    base = open_checkpoint(tiny_qwen2(tmp_path / "base"))
    rounded = rounded_to_nf4(base, "double")
    linears = {linear.tensor for linear in decoder_linears(base)}
    assert rounded.config_bytes == base.config_bytes
    for name in base:
        assert torch.equal(rounded.load(name), base.load(name)) is (name not in linears), name


def test_what_qlora_rounds_is_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="experts"):
        rounded_to_nf4(open_checkpoint(tiny_model("qwen3_moe", tmp_path / "moe")), "double")
    with pytest.raises(InputRefused, match="vision"):
        rounded_to_nf4(open_checkpoint(tiny_model("qwen2_vl", tmp_path / "vl")), "double")
    codes = round_to_codes(tiny_qwen2(tmp_path / "base"), tmp_path / "codes", group_size=32)
    with pytest.raises(QuantizedInputRefused, match="--base-dequantize"):
        rounded_to_nf4(open_checkpoint(codes), "double")


def _rounded(weight: torch.Tensor, statistics: Statistics) -> Checkpoint:
    """Return a checkpoint whose only layer has this weight in each of its matrices that has its shape."""
    outputs, inputs = weight.shape
    config = {
        "model_type": "qwen2", "hidden_size": inputs, "intermediate_size": outputs, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2,
    }  # fmt: skip
    shapes = {
        **{f"self_attn.{name}_proj": (2, inputs) for name in "qkv"}, "self_attn.o_proj": (inputs, 2),
        "mlp.gate_proj": (outputs, inputs), "mlp.up_proj": (outputs, inputs), "mlp.down_proj": (inputs, outputs),
    }  # fmt: skip
    tensors = {
        f"model.layers.0.{name}.weight": torch.zeros(shape, dtype=weight.dtype) for name, shape in shapes.items()
    }
    tensors["model.layers.0.mlp.up_proj.weight"] = weight
    return rounded_to_nf4(checkpoint_of(tensors, config), statistics)
