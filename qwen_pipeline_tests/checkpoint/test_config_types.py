"""Configs with values of wrong types are refused by path; every config that Transformers writes is taken."""

from typing import Any

import pytest
from transformers import AutoConfig

from qwen_pipeline.checkpoint.config_types import require_types
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.qwen.families import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_config_is_taken(family: str) -> None:
    require_types(AutoConfig.for_model(family).to_dict(), source="config.json")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_size": float("nan")}, "hidden_size is nan, expected an integer from 0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"head_dim": -1}, "head_dim is -1"),
        ({"num_hidden_layers": 2**70}, "num_hidden_layers is 1180591620717411303424"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf, expected a finite number"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"text_config": []}, r"text_config is \[\], expected an object"),
        ({"thinker_config": {"text_config": {"layer_types": 5}}}, "thinker_config.text_config.layer_types is 5"),
        ({"architectures": "Qwen3ForCausalLM"}, "architectures is 'Qwen3ForCausalLM', expected a list of texts"),
        ({"mlp_only_layers": [None]}, "mlp_only_layers"),
        ({"eos_token_id": "x"}, "expected an integer or a list of them"),
        ({"model_type": ["qwen3"], "tie_word_embeddings": 1}, "model_type .* tie_word_embeddings"),
    ],
)  # fmt: skip
def test_a_wrong_type_is_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointRefused, match=words):
        require_types(config, source="config.json")


def test_null_and_unknown_fields_are_taken() -> None:
    require_types({"hidden_size": None, "text_config": None, "anything": float("nan")}, source="config.json")
