"""Codes replace weights, in the source's order and shards; other tensors that an engine wrote are ignored."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.errors import WorkerFailed
from qwen_pipeline.qwen.linears import Linear, decoder_linears
from qwen_pipeline.transforms.codes.gptq import CODES, gptq_format
from qwen_pipeline.transforms.codes.packed import quantized_checkpoint
from qwen_pipeline_tests.in_memory import checkpoint_of
from qwen_pipeline_tests.tiny import tiny_qwen2


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(tiny_qwen2(tmp_path / "source", shards=3))


def codes(linears: list[Linear], bits: int) -> dict[str, torch.Tensor]:
    form = gptq_format({"quantization_config": settings(bits)})
    return {
        f"{linear.module}.{code}": torch.ones(spec.shape, dtype=spec.torch_dtype)
        for linear in linears
        for code, spec in form.code_specs(linear.out_features, linear.in_features).items()
    }


def settings(bits: int) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": 32}


def quantized(source: Checkpoint, packed: Mapping[str, torch.Tensor], bits: int = 4) -> Checkpoint:
    return quantized_checkpoint(
        source, checkpoint_of(packed, {}, shard="packed"), decoder_linears(source), settings(bits)
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_each_weight_is_replaced_by_four_tensors(source: Checkpoint, bits: int) -> None:
    linears = decoder_linears(source)
    output = quantized(source, codes(linears, bits) | {"lm_head.extra": torch.ones(1)}, bits)

    weights = {f"{linear.module}.weight": linear.module for linear in linears}
    expected = [
        new for name in source for new in ([f"{weights[name]}.{code}" for code in CODES] if name in weights else [name])
    ]
    assert list(output) == expected
    assert output.shards == {
        new: source.shards.get(new) or source.shards[f"{new.rpartition('.')[0]}.weight"] for new in expected
    }
    assert output.config == {**source.config, "quantization_config": settings(bits)}
    assert output["model.layers.0.mlp.down_proj.qweight"].shape == (96 * bits // 32, 64)


def test_a_module_without_codes_keeps_its_weight(source: Checkpoint) -> None:
    linears = decoder_linears(source)
    output = quantized(source, codes(linears[1:], 4))
    assert output[f"{linears[0].module}.weight"] == source[f"{linears[0].module}.weight"]
    assert f"{linears[0].module}.qweight" not in output


def test_codes_of_another_shape_are_refused_by_name(source: Checkpoint) -> None:
    packed = codes(decoder_linears(source), 4)
    name = "model.layers.1.mlp.up_proj.scales"
    with pytest.raises(WorkerFailed, match=r"up_proj\.scales is F16 \[1, 96\], expected F16 \[2, 96\]"):
        quantized(source, packed | {name: packed[name][:1]})
    with pytest.raises(WorkerFailed, match=r"up_proj\.scales is missing"):
        quantized(source, {key: tensor for key, tensor in packed.items() if key != name})
