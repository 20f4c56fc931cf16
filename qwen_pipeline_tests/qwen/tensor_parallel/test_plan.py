"""Options are valid and minimal, and their costs are right."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.tensor_parallel.feasibility import divisions
from qwen_pipeline.qwen.tensor_parallel.plan import fewer_ranks, options, padding_for, quantized_bytes
from qwen_pipeline_tests.qwen.published import DEFAULTS, PUBLISHED, QWEN2_72B, Published, as_config, config_of

BIG = QWEN2_72B | {"vocab_size": 152064}


def test_the_72b_is_padded_by_128_and_keeps_groups_of_128() -> None:
    kernels = ("vllm-marlin", "vllm-machete", "vllm-cpu")
    best, *others = options(BIG, {kernel: [2, 4, 8] for kernel in kernels})
    assert (best.group_size, best.plan.sizes[0].padded, best.verdict) == (128, 29696, "ok")
    assert 0.003 < best.weights < 128 / 29568
    assert best.flops == pytest.approx(best.weights)
    assert {option.verdict for option in others if not option.plan.changes} <= {"refused", "silently wrong"}
    assert 41e9 < quantized_bytes(BIG, 128) < 42e9  # as published


def test_fewer_ranks_may_need_no_padding() -> None:
    padded, unpadded = fewer_ranks(BIG, {"vllm-marlin": [2, 4, 8]}, group_sizes=[128, 64])
    assert (padded.name, padded.degrees) == ("groups of 128, padded", (2, 4))
    assert (unpadded.name, unpadded.degrees) == ("groups of 64, unpadded", (2,))
    assert fewer_ranks(BIG, {"vllm-marlin": [1]}) == []


def test_small_experts_get_smaller_groups_instead_of_twice_the_weights() -> None:
    best = options(config_of("Qwen3-Next-80B-A3B"), {"vllm-marlin": [8]}, group_sizes=[128, 64])[0]
    assert best.group_size == 64
    assert not best.plan.changes


@settings(deadline=None)
@given(
    live=st.integers(64, 4096),
    experts=st.integers(32, 1024),
    degrees=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=3),
    group_size=st.sampled_from([32, 64, 128]),
)
def test_a_padded_option_is_valid_and_minimal(live: int, experts: int, degrees: list[int], group_size: int) -> None:
    """With one unit less of any size, a rank of the highest degree would not hold whole groups."""
    config = config_of("Qwen1.5-MoE-A2.7B") | {
        "moe_intermediate_size": experts,
        "shared_expert_intermediate_size": live,
        "num_hidden_layers": 1,
    }
    found = options(config, {"vllm-cpu": degrees}, group_sizes=[group_size])
    widest = max(found, key=lambda option: option.weights)
    unit = group_size * max(degrees)
    for size in widest.plan.sizes:
        assert size.padded % unit == 0
        assert 0 <= size.zeros < unit
    assert widest.verdict in ("ok", "refused")
    assert not any("down_proj" in reason for prediction in widest.predictions for reason in prediction.reasons)
    assert all(
        not split.straddling for split in divisions(widest.config, group_size=group_size, ranks=max(degrees))[-2:]
    )


def test_padding_follows_from_the_targets() -> None:
    assert padding_for(BIG, {"vllm": [2], "sglang": [8]}, group_size=128).sizes[0].padded == 29696
    assert not padding_for(BIG, {"lmdeploy-turbomind": [8]}, group_size=128).changes  # it pads by itself
    odd = padding_for(BIG | {"intermediate_size": 29600}, {"lmdeploy-turbomind": [8]}, group_size=128, layout="append")
    assert (odd.sizes[0].padded, odd.sizes[0].layout) == (29696, "append")  # the engine expects whole groups


def test_targets_that_no_padding_serves_are_refused_with_an_alternative() -> None:
    small = config_of("Qwen2.5-0.5B")
    with pytest.raises(InputRefused, match=r"vllm at TP 2: .*o_proj: 448 inputs") as refusal:
        padding_for(small, {"vllm": [2]}, group_size=128)
    assert "TP 2 with groups of 64, unpadded" in refusal.value.remedy
    with pytest.raises(InputRefused, match="14 attention heads are not divisible by 4") as refusal:
        padding_for(small, {"vllm": [4]}, group_size=64)
    assert "TP 2 with groups of 64, unpadded" in refusal.value.remedy


@pytest.mark.parametrize(
    "model", [model for model in PUBLISHED if model.source == DEFAULTS], ids=lambda model: model.name
)
def test_checked_sizes_are_the_defaults_of_transformers(model: Published) -> None:
    theirs = {name: value for name, value in AutoConfig.for_model(model.family).to_dict().items() if value is not None}
    derived = {"head_dim": model.hidden // model.heads}
    for field, value in as_config(model).items():
        assert (derived | theirs)[field] == value, field
