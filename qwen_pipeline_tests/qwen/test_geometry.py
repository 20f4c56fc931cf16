"""Padding plans are minimal and valid, and degrees are assessed correctly."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.geometry import dump_plan, load_plan, plan_padding
from qwen_pipeline.qwen.padding_spec import Layout
from qwen_pipeline.qwen.tensor_parallel.feasibility import assess_degrees
from qwen_pipeline_tests.qwen.published import QWEN2_72B


@given(
    live=st.integers(1, 40_000),
    group_size=st.sampled_from([1, 32, 64, 128]),
    tensor_parallel=st.integers(1, 16),
    layout=st.sampled_from(["interleave", "append"]),
)
def test_a_plan_is_valid_and_minimal_and_keeps_the_order(
    live: int, group_size: int, tensor_parallel: int, layout: Layout
) -> None:
    config = QWEN2_72B | {"intermediate_size": live}
    plan = plan_padding(config, group_size=group_size, tensor_parallel=tensor_parallel, layout=layout)
    (size,) = plan.sizes
    unit = group_size * tensor_parallel
    positions = size.positions()

    assert size.padded % unit == 0
    assert 0 <= size.zeros < unit
    assert plan.changes == (live % unit != 0)
    assert len(positions) == live
    assert positions[0] >= 0
    assert positions[-1] < size.padded
    assert (positions.diff() > 0).all()
    assert load_plan(dump_plan(plan)) == plan


@given(
    live=st.integers(1, 40_000),
    group_size=st.sampled_from([2, 32, 64, 128]),
    tensor_parallel=st.integers(1, 16),
)
def test_interleaving_gives_every_group_half_of_its_share_of_live_channels(
    live: int, group_size: int, tensor_parallel: int
) -> None:
    """A group's share is its number of live channels if they could be spread without rounding."""
    config = QWEN2_72B | {"intermediate_size": live}
    (size,) = plan_padding(config, group_size=group_size, tensor_parallel=tensor_parallel).sizes
    held = (size.positions() // group_size).bincount(minlength=size.padded // group_size)
    share = group_size * live / size.padded
    assert held.min() >= (share / 2 if share >= 1 else 0)
    if size.zeros > group_size:
        assert held.max() - held.min() <= 1


def test_all_paths_of_a_width_are_found_in_nested_configs() -> None:
    text = {name: value for name, value in QWEN2_72B.items() if name != "model_type"}
    nested = {"model_type": "qwen2_5_vl", "text_config": text, "vision_config": {"intermediate_size": 3420}}
    assert plan_padding(nested, group_size=128, tensor_parallel=8).sizes[0].places == ("text_config.intermediate_size",)
    both = nested | {"intermediate_size": 29568}
    (size,) = plan_padding(both, group_size=128, tensor_parallel=8).sizes
    assert size.places == ("intermediate_size", "text_config.intermediate_size")


@pytest.mark.parametrize(
    "config",
    [
        QWEN2_72B | {"text_config": {"intermediate_size": 29696}},
        QWEN2_72B | {"intermediate_size": None},
        {name: value for name, value in QWEN2_72B.items() if name != "intermediate_size"},
    ],
    ids=["conflicting", "not a number", "missing"],
)
def test_a_config_without_a_unique_width_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InputRefused, match="intermediate_size"):
        plan_padding(config, group_size=128, tensor_parallel=8)


@pytest.mark.parametrize(("group_size", "tensor_parallel"), [(0, 8), (-1, 8), (128, 0)])
def test_numbers_that_are_not_positive_are_refused(group_size: int, tensor_parallel: int) -> None:
    with pytest.raises(InputRefused, match="positive"):
        plan_padding(QWEN2_72B, group_size=group_size, tensor_parallel=tensor_parallel)


def test_degrees_of_the_72b() -> None:
    rows = assess_degrees(QWEN2_72B, group_size=128, degrees=[1, 2, 4, 8, 3])
    assert [row.sizes[0].target for row in rows] == [29568, 29696, 29696, 29696, 29568]
    assert [row.whole for row in rows] == [True, False, False, False, True]
    assert [row.sizes[0].groups_per_rank for row in rows[:4]] == [(231, 231), (115.5, 116), (57.75, 58), (28.875, 29)]
    assert [row.legal for row in rows] == [True, True, True, True, False]
    assert rows[0].sentence == "Serves without padding."
    assert "pad intermediate_size from 29568 to 29696 before quantizing" in rows[1].sentence
    assert "64 attention heads are not divisible by 3" in rows[4].sentence
    assert rows[3].sizes[0].extra_percent == pytest.approx(100 * 128 / 29568)


def test_degrees_of_a_mixture_have_every_size() -> None:
    mixture = QWEN2_72B | {"model_type": "qwen2_moe", "intermediate_size": 5632, "num_experts": 60}
    mixture |= {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
    (row,) = assess_degrees(mixture, group_size=128, degrees=[2])
    assert {size.field: (size.live, size.target) for size in row.sizes} == {
        "moe_intermediate_size": (1408, 1536),
        "shared_expert_intermediate_size": (5632, 5632),
    }
    assert not row.whole


def test_padding_does_not_help_an_output_projection_that_straddles_groups() -> None:
    small = {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
             "num_key_value_heads": 2, "num_hidden_layers": 24}  # fmt: skip
    (row,) = assess_degrees(small, group_size=128, degrees=[2])
    assert not row.legal
    assert "o_proj has 448 inputs per rank" in row.sentence
