"""Predictions for 8-bit floats: reports of engines that refused published checkpoints, and the padding that helps."""

from typing import Any

import pytest

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.methods import FP8_LAYOUTS
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.qwen.tensor_parallel.float_plan import fewer_float_ranks, float_options
from qwen_pipeline.qwen.tensor_parallel.floats import (
    divided_blocks,
    float_bytes,
    float_padding_for,
    padded_config,
    predict_float_serving,
)
from qwen_pipeline.qwen.tensor_parallel.plan import plan_for
from qwen_pipeline_tests.qwen.published import config_of

BLOCKS, CHANNELS = FP8_LAYOUTS["fp8"], FP8_LAYOUTS["fp8-dynamic"]
QWEN2_72B: dict[str, Any] = dict(config_of("Qwen2-72B, Qwen2.5-72B, Qwen2-VL-72B"))
MIXTURE: dict[str, Any] = {
    "model_type": "qwen3_moe", "num_hidden_layers": 2, "hidden_size": 2048, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_experts": 8, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "vocab_size": 1024, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "degree", "reason"),
    [
        (MIXTURE, 2, ""),
        (MIXTURE, 4, "mlp.experts.*.gate_proj has 192 outputs per rank, which is not a multiple of 128"),
        (QWEN2_72B, 1, ""),
        (QWEN2_72B, 8, "mlp.gate_proj has 3696 outputs per rank, which is not a multiple of 128"),
    ],
)
def test_engines_refuse_divided_blocks(config: dict[str, Any], degree: int, reason: str) -> None:
    """Qwen3-30B-A3B on 4 ranks: vllm#44763 ("the dimensions is 768/4=192")."""
    for engine in ("vllm", "sglang"):
        found = predict_float_serving(config, engine, BLOCKS, degree=degree)
        assert found.verdict == ("refused" if reason else "ok")
        assert not reason or any(reason in each for each in found.reasons)
        assert predict_float_serving(config, engine, CHANNELS, degree=degree).verdict == "ok"
    assert bool(divided_blocks(config, BLOCKS, degree=degree)) == bool(reason)
    assert divided_blocks(config, CHANNELS, degree=degree) == []


def test_padding_makes_blocks_whole_and_no_wider() -> None:
    plan = float_padding_for(QWEN2_72B, {"vllm": [2, 8]}, BLOCKS)
    assert [(size.live, size.padded) for size in plan.sizes] == [(29568, 29696)]
    assert divided_blocks(padded_config(QWEN2_72B, plan), BLOCKS, degree=8) == []
    assert not float_padding_for(QWEN2_72B, {"vllm": [8]}, CHANNELS).changes
    spec = PaddingSpec(group_size=128, targets={"vllm": (8,)}, method="fp8")
    assert plan_for(QWEN2_72B, spec).sizes[0].padded == 29696
    assert spec.to_json()["method"] == "fp8"
    assert "method" not in PaddingSpec(method="fp8").to_json()


def test_attention_that_divides_blocks_is_refused_with_a_remedy() -> None:
    narrow = MIXTURE | {"head_dim": 64, "num_key_value_heads": 8, "moe_intermediate_size": 1024}
    with pytest.raises(InputRefused, match=r"self_attn.k_proj has 64 outputs per rank.*\n.*fp8-dynamic"):
        float_padding_for(narrow, {"vllm": [8]}, BLOCKS)
    assert float_padding_for(narrow, {"vllm": [8]}, CHANNELS)
    with pytest.raises(InputRefused, match=r"24 ranks.*|heads are not divisible"):
        float_padding_for(narrow, {"vllm": [24]}, CHANNELS)
    (fewer,) = fewer_float_ranks(narrow, {"vllm": [8]}, BLOCKS)
    assert fewer.degrees == (4,)


def test_options_are_sorted_by_verdict_and_bytes() -> None:
    padded, unpadded = float_options(QWEN2_72B, {"vllm": [8]}, BLOCKS)
    assert (padded.name, unpadded.name) == ("fp8, padded", "fp8, unpadded")
    assert padded.serves
    assert unpadded.verdict == "refused"
    (only,) = float_options(QWEN2_72B, {"vllm": [8]}, CHANNELS)
    assert only.name == "fp8-dynamic, unpadded"
    assert only.rank_bytes == pytest.approx(72.7e9 * 1.03 / 8, rel=0.02)
    assert float_bytes(QWEN2_72B, BLOCKS) < float_bytes(QWEN2_72B, CHANNELS)


def test_unknown_engines_are_unknown() -> None:
    assert predict_float_serving(QWEN2_72B, "lmdeploy-turbomind", BLOCKS, degree=1).verdict == "unknown"
    with pytest.raises(InputRefused, match="no serving engine"):
        predict_float_serving(QWEN2_72B, "other", BLOCKS, degree=1)
