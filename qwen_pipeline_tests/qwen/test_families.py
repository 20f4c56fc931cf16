"""Every Qwen family of the installed Transformers is either padded or refused by name."""

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # pyright: ignore[reportPrivateImportUsage]

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.families import DENSE, places_of, require_dense, require_mlp_tensors, stored_names
from qwen_pipeline.qwen.geometry import plan_padding
from qwen_pipeline.transforms.padding import pad
from qwen_pipeline_tests.tiny import VISION, tiny_qwen2, tiny_qwen3, tiny_vl

FAMILIES = sorted(name for name in CONFIG_MAPPING_NAMES if "qwen" in name)
TINY = {"qwen2": tiny_qwen2, "qwen3": tiny_qwen3} | {family: partial(tiny_vl, family) for family in VISION}


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
    TINY[family](tmp_path)
    live = open_checkpoint(tmp_path)

    axes = require_mlp_tensors(live, 96)
    expected = [name for name in live if ".mlp." in name and "visual" not in name]
    assert sorted(axes) == sorted(expected)
    assert len(axes) == 6

    padded = pad(live, plan_padding(live.config, group_size=32, tensor_parallel=4))
    assert [name for name in live if padded[name] != live[name]] == [name for name in live if name in axes]
    if family in VISION:
        assert padded.config["vision_config"] == live.config["vision_config"]
    place = "text_config.intermediate_size" if family in VISION else "intermediate_size"
    assert places_of(live.config, "intermediate_size") == (place,)


@pytest.mark.parametrize("family", DENSE)
def test_each_linear_layer_in_memory_has_one_stored_tensor(family: str, tmp_path: Path) -> None:
    stored = open_checkpoint(TINY[family](tmp_path))
    auto = AutoModelForImageTextToText if family in VISION else AutoModelForCausalLM
    for name, module in auto.from_pretrained(tmp_path).named_modules():
        if isinstance(module, torch.nn.Linear):
            assert len(stored_names(name, stored)) == 1, name
