"""Verdicts of engines on towers, by widths and heads, and the sentences on refusals."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.tensor_parallel.find import assess_targets
from qwen_pipeline.evaluation.tensor_parallel.findings import Target
from qwen_pipeline.qwen.families import FAMILIES
from qwen_pipeline.qwen.tensor_parallel.towers import TOWER_RULES, assess_towers, predict_tower_serving, tower_obstacles
from qwen_pipeline.qwen.towers import TOWERS, towers_of
from qwen_pipeline_tests.qwen.published import DEFAULTS, QWEN2_5_VL_3B, PublishedTower
from qwen_pipeline_tests.qwen.published import TOWERS as PUBLISHED_TOWERS


def config_of(family: str, **sizes: int) -> dict[str, Any]:
    """Return Transformers' own defaults of a family, with sizes of its towers changed."""
    config = AutoConfig.for_model(family).to_dict()
    for level in (config, config.get("thinker_config", {})):
        for section in ("vision_config", "audio_config"):
            tower = level.get(section, {})
            tower |= {name: size for name, size in sizes.items() if name in tower}
    return config


def verdicts(config: dict[str, Any], engine: str = "vllm") -> dict[str, list[str]]:
    return {
        tower.part: [predict_tower_serving(config, tower, engine, degree=degree).verdict for degree in (1, 2, 4, 8, 16)]
        for tower in towers_of(config)
    }


def test_towers_are_listed_for_every_family_that_has_them() -> None:
    for name, towers in TOWERS.items():
        assert {tower.part for tower in towers} == {"vision", "audio"} & set(FAMILIES[name].towers.values())
        assert towers_of(config_of(name)) == list(towers)
    assert {name for name, family in FAMILIES.items() if family.towers} - TOWERS.keys() == {
        "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text",
    }  # fmt: skip


def test_vllm_refuses_heads_and_widths_that_ranks_do_not_divide() -> None:
    fine = ["ok"] * 5
    assert verdicts(config_of("qwen2_vl")) == {"vision": fine}  # 5120 channels, 16 heads
    assert verdicts(config_of("qwen2_5_vl")) == {"vision": ["ok", "ok", "ok", "refused", "refused"]}  # 3420
    assert verdicts(config_of("qwen3_vl")) == {"vision": fine}  # 4304
    assert verdicts(config_of("qwen3_5_moe", num_heads=12)) == {"vision": ["ok", "ok", "ok", "refused", "refused"]}
    assert verdicts(config_of("qwen2_audio", encoder_ffn_dim=5121)) == {"audio": fine}  # every rank holds all of it
    heads_of_20 = {"encoder_attention_heads": 20, "encoder_ffn_dim": 5122}
    assert verdicts(config_of("qwen3_asr", **heads_of_20)) == {"audio": ["ok", "ok", "refused", "ok", "ok"]}
    assert verdicts(config_of("qwen4_exp")) == {"vision": ["ok", *["unknown"] * 4]}
    assert verdicts(config_of("qwen2_5_vl"), "lmdeploy-turbomind") == {"vision": ["ok", *["unknown"] * 4]}
    assert verdicts(config_of("qwen2_5_vl"), "vllm-marlin") == verdicts(config_of("qwen2_5_vl"))


def test_a_refusal_names_every_remedy() -> None:
    (sentence,) = tower_obstacles(QWEN2_5_VL_3B, {"vllm": [2, 4, 8]})
    assert sentence == (
        "vllm at TP 8 refuses the vision tower: its MLPs of 3,420 channels are not divisible by 8 ranks. Remedy: pad"
        " its MLPs with --towers, from 3,420 to 3,424 (+0.12% of their weights, 1.0 MB), or start vllm with"
        " --mm-encoder-tp-mode data, which replicates it on every rank."
    )
    (sentence,) = tower_obstacles(QWEN2_5_VL_3B, {"sglang": [8]})
    assert "--towers" in sentence
    assert "--mm-enable-dp-encoder" in sentence
    (sentence,) = tower_obstacles(QWEN2_5_VL_3B, {"vllm": [3]})  # 16 heads: no padding of MLPs helps
    assert sentence.endswith("Remedy: start vllm with --mm-encoder-tp-mode data, which replicates it on every rank.")
    (sentence,) = tower_obstacles(config_of("qwen3_omni_moe", num_heads=15), {"vllm": [2]})
    assert sentence.endswith("its 15 heads are not divisible by 2 ranks. Remedy: use fewer ranks.")
    (sentence,) = tower_obstacles(QWEN2_5_VL_3B | {"vision_config": {"num_heads": 16}}, {"vllm": [8]})
    assert sentence.startswith("vision_config.intermediate_size must be one positive number")
    assert not tower_obstacles({"model_type": "qwen2"}, {"vllm": [8]})


@given(
    family=st.sampled_from(sorted(TOWERS.keys() - {"qwen2_vl"})),
    width=st.integers(1, 10_000),
    degrees=st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=3, unique=True),
    engine=st.sampled_from(sorted(TOWER_RULES)),
)
def test_after_padding_no_width_is_refused(family: str, width: int, degrees: list[int], engine: str) -> None:
    heads = {"num_heads": 48, "encoder_attention_heads": 48}
    config = CONFIGS[family] = CONFIGS.get(family) or config_of(family, **heads)
    for level in (config, config.get("thinker_config", {})):
        for section, field in (("vision_config", "intermediate_size"), ("audio_config", "encoder_ffn_dim")):
            level.get(section, {})[field] = width
    for tower in assess_towers(config, {engine: degrees}):
        assert {prediction.verdict for prediction in tower.padded_predictions} <= {"ok", "unknown"}
        assert tower.extra == (tower.padded - width) / width
        assert all(prediction.padding_helps for prediction in tower.predictions if prediction.verdict == "refused")
        hidden = tower.tower.size(config, tower.tower.hidden)
        rows = len(tower.tower.outputs) * (hidden + 1) + hidden
        assert tower.extra_bytes == 2 * (tower.padded - width) * rows * tower.tower.size(config, tower.tower.depth)


CONFIGS: dict[str, dict[str, Any]] = {}


def test_validation_reports_a_target_that_refuses_a_tower() -> None:
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    narrow = QWEN2_5_VL_3B | {"intermediate_size": 11264, "quantization_config": settings}
    wide = narrow | {"vision_config": QWEN2_5_VL_3B["vision_config"] | {"intermediate_size": 3424}}
    refused, served = (assess_targets(config, 8, [Target(engine="vllm", degree=8)]) for config in (narrow, wide))
    assert refused
    assert served
    assert (served.legal, refused.legal, refused.whole) == (True, False, True)  # a warning: an option helps
    assert refused.sentence == tower_obstacles(narrow, {"vllm": [8]})[0]


@pytest.mark.parametrize(
    "published", [tower for tower in PUBLISHED_TOWERS if tower.source == DEFAULTS], ids=lambda tower: tower.name
)
def test_published_towers_are_the_defaults_of_transformers(published: PublishedTower) -> None:
    assert config_of(published.family)[f"{published.part}_config"].items() >= published.sizes.items()


def test_targets_without_a_degree_are_refused() -> None:
    with pytest.raises(InputRefused, match="at least one degree"):
        assess_towers(QWEN2_5_VL_3B, {})
