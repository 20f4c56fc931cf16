"""Every Qwen family of the installed Transformers is either padded or refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # pyright: ignore[reportPrivateImportUsage]

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.families import DENSE, places_of, require_dense, require_mlp_tensors, stored_names
from qwen_pipeline.qwen.geometry import plan_padding
from qwen_pipeline.transforms.padding import pad

FAMILIES = sorted(name for name in CONFIG_MAPPING_NAMES if "qwen" in name)
TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}
VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 3},
    "qwen2_5_vl": {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 64},
    "qwen3_vl": {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 64,
                 "deepstack_visual_indexes": [0]},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_dense_or_refused_by_name(family: str) -> None:
    config = AutoConfig.for_model(family).to_dict()
    if family in DENSE:
        assert require_dense(config) == family
    else:
        with pytest.raises(InputRefused, match=family):
            require_dense(config)


def test_experts_and_hybrids_are_told_apart_from_the_unknown() -> None:
    reasons = {"qwen3_moe": "experts", "qwen3_5": "linear and full attention", "qwen2_audio": "tensor names"}
    for family, reason in reasons.items():
        with pytest.raises(InputRefused, match=reason):
            require_dense(AutoConfig.for_model(family).to_dict())


@pytest.mark.parametrize("family", DENSE)
def test_the_mlps_of_the_decoder_are_found_as_transformers_saves_them_and_no_others(
    family: str, tmp_path: Path
) -> None:
    if family in VISION:
        config = AutoConfig.for_model(family, text_config=TEXT, vision_config=VISION[family])
        model = AutoModelForImageTextToText.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TEXT))
    model.save_pretrained(tmp_path)
    live = open_checkpoint(tmp_path)

    axes = require_mlp_tensors(live, 96)
    expected = [name for name in live if ".mlp." in name and "visual" not in name]
    assert sorted(axes) == sorted(expected)
    assert len(axes) == 6

    padded = pad(live, plan_padding(live.config, group_size=32, tensor_parallel=4))
    assert [name for name in live if padded[name] != live[name]] == [name for name in live if name in axes]
    if family in VISION:
        assert padded.config["vision_config"] == live.config["vision_config"]
    assert [place.rpartition(".")[0] for place in places_of(live.config, "intermediate_size")] == (
        ["text_config"] if family in VISION else [""]
    )

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert len(stored_names(name, live)) == 1, name
