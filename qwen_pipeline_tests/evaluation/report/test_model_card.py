"""The statements of a model card about towers; ``stages/test_publish.py`` tests the rest in a release."""

from dataclasses import replace
from typing import Any

from qwen_pipeline.evaluation.report.model_card import ModelCard, Widened
from qwen_pipeline_tests.qwen.published import QWEN2_5_VL_3B

DECODER = Widened(field="intermediate_size", live=11008, padded=11264)
TOWER = Widened(field="vision_config.intermediate_size", live=3420, padded=3424)


def card(*padding: Widened, **vision: int) -> str:
    settings = {"bits": 4, "group_size": 128}
    sizes: dict[str, Any] = {**QWEN2_5_VL_3B["vision_config"], **vision}
    config = QWEN2_5_VL_3B | {"intermediate_size": 11264, "vision_config": sizes, "quantization_config": settings}
    return ModelCard(
        name="bot", base_model="Qwen/Tiny", config=config, padding=padding, split=True, quality="", verdict="", steps=[]
    ).render()  # fmt: skip


def test_a_padded_tower_is_distinguished_from_the_decoder() -> None:
    said = "Each MLP of the vision tower has 3424 channels instead of the base's 3420: zeros at the end, so that ranks"
    both = card(DECODER, TOWER, intermediate_size=3424)
    assert "Each MLP has 11264 channels instead of the base's 11008, so that tensor-parallel ranks" in both
    assert f"the parts add up to the original channel. {said} can share the tower. Adapters" in both
    assert f"## Padding\n\n{said}" in card(TOWER, intermediate_size=3424)
    assert "vision tower" not in card(DECODER, intermediate_size=3424)


def test_a_tower_that_vllm_refuses_is_mentioned() -> None:
    narrow = card(DECODER)
    assert "vllm at TP 8 refuses the vision tower" in narrow
    assert "--mm-encoder-tp-mode data" in narrow
    assert "refuses" not in card(DECODER, TOWER, intermediate_size=3424)


def test_the_recipe_is_named_unless_it_is_the_default_one() -> None:
    settings = {"quantization_config": {"bits": 4, "group_size": 128}}
    default = ModelCard(
        name="bot",
        base_model="Qwen/Tiny",
        config=QWEN2_5_VL_3B | settings,
        padding=[],
        split=True,
        quality="",
        verdict="",
        steps=[],
    )
    by_recipe = replace(default, recipe="fast").render()
    assert "It was made by the recipe `fast`. The weights are safetensors" in by_recipe
    assert by_recipe.replace(" It was made by the recipe `fast`.", "") == default.render()
