"""Configs are compared field by field, however deep."""

from qwen_pipeline.qwen.config import diff_configs, flat_config

BEFORE = {"model_type": "qwen", "text_config": {"hidden_size": 8, "intermediate_size": 24}, "sizes": [1], "extra": {}}


def test_a_config_is_flattened_to_paths() -> None:
    assert flat_config(BEFORE) == {
        "model_type": "qwen",
        "text_config.hidden_size": 8,
        "text_config.intermediate_size": 24,
        "sizes": [1],
        "extra": {},
    }


def test_fields_that_change_appear_or_disappear_are_found() -> None:
    after = {
        "model_type": "qwen",
        "text_config": {"hidden_size": 8, "intermediate_size": 32},
        "vision_config": {"depth": 2},
        "extra": {},
    }
    assert diff_configs(BEFORE, after) == {
        "text_config.intermediate_size": 32,
        "vision_config.depth": 2,
        "sizes": None,
    }
    assert not diff_configs(BEFORE, BEFORE)
