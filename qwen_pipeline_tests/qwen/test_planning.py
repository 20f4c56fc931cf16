"""Options are legal, minimal and rightly costed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from qwen_pipeline.qwen.planning import legal_degree, options, quantized_bytes
from qwen_pipeline_tests.qwen.published import DEFAULTS, PUBLISHED, Published, as_config, config_of
from qwen_pipeline_tests.qwen.test_geometry import QWEN2_72B

BIG = QWEN2_72B | {"vocab_size": 152064}


def test_the_72b_is_padded_by_128_and_keeps_groups_of_128() -> None:
    best, *others = options(BIG, engines=["vllm-marlin", "vllm-machete", "vllm-cpu"], degrees=[2, 4, 8])
    assert (best.group_size, best.plan.sizes[0].padded, best.verdict) == (128, 29696, "ok")
    assert 0.003 < best.weights < 128 / 29568
    assert best.flops == pytest.approx(best.weights)
    assert {at.verdict for at in others if not at.plan.changes} <= {"refused", "silently wrong"}
    assert 41e9 < quantized_bytes(BIG, 128) < 42e9  # as published
    assert legal_degree(BIG, engines=["vllm-marlin"], group_size=128, below=8) == 1


def test_small_experts_get_smaller_groups_rather_than_twice_the_weights() -> None:
    best = options(config_of("Qwen3-Next-80B-A3B"), engines=["vllm-marlin"], degrees=[8], group_sizes=[128, 64])[0]
    assert best.group_size == 64
    assert not best.plan.changes


@given(
    live=st.integers(64, 4096),
    experts=st.integers(32, 1024),
    degrees=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=3),
    group_size=st.sampled_from([32, 64, 128]),
)
def test_a_padded_option_is_legal_and_no_smaller_padding_is(
    live: int, experts: int, degrees: list[int], group_size: int
) -> None:
    config = config_of("Qwen1.5-MoE-A2.7B") | {
        "moe_intermediate_size": experts,
        "shared_expert_intermediate_size": live,
        "num_hidden_layers": 1,
    }
    found = options(config, engines=["vllm-cpu"], degrees=degrees, group_sizes=[group_size])
    widest = max(found, key=lambda at: at.weights)
    unit = group_size * max(degrees)
    for size in widest.plan.sizes:
        assert size.padded % unit == 0
        assert 0 <= size.zeros < unit
    assert widest.verdict in ("ok", "refused")
    assert not any("down_proj" in reason for at in widest.servings for reason in at.reasons)


@pytest.mark.parametrize(
    "model", [model for model in PUBLISHED if model.source == DEFAULTS], ids=lambda model: model.name
)
def test_checked_sizes_are_the_defaults_of_transformers(model: Published) -> None:
    theirs = {name: value for name, value in AutoConfig.for_model(model.family).to_dict().items() if value is not None}
    derived = {"head_dim": model.hidden // model.heads}
    for field, value in as_config(model).items():
        assert (derived | theirs)[field] == value, field
