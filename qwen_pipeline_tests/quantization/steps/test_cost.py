"""Estimated seconds of recipes are those of the measured layers, and grow with what is computed."""

from typing import Any

import pytest

from qwen_pipeline.quantization.recipes import RECIPES
from qwen_pipeline.quantization.spec import Device, QuantSpec
from qwen_pipeline.quantization.steps.cost import REFERENCES, machine_rate, recipe_costs

COMMON = {"vocab_size": 152064, "num_hidden_layers": 2}
WIDE = {**COMMON, "model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 29696, "num_attention_heads": 64, "num_key_value_heads": 8}  # fmt: skip  # noqa: E501
SMALL = {**COMMON, "model_type": "qwen2", "hidden_size": 576, "intermediate_size": 1600, "num_attention_heads": 9, "num_key_value_heads": 3}  # fmt: skip  # noqa: E501
MIXTURE = {
    **COMMON, "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 4,
}  # fmt: skip


def seconds(config: dict[str, Any], device: Device, *, cores: int = 1, faster: float = 1, **spec: Any) -> list[float]:
    reference = REFERENCES[device]
    costs = recipe_costs(config, QuantSpec(device=device, **spec), rate=reference.rate * faster, cores=cores)
    assert [cost.recipe for cost in costs] == list(RECIPES)
    return [cost.seconds for cost in costs]


@pytest.mark.parametrize(("device", "config", "text"), [("cuda", WIDE, (128, 2048)), ("cpu", SMALL, (16, 512))])
def test_a_measured_layer_costs_what_was_measured(
    device: Device, config: dict[str, Any], text: tuple[int, int]
) -> None:
    samples, seq_len = text
    found = seconds(config, device, samples=samples, seq_len=seq_len)
    measured = [2 * each for each in REFERENCES[device].seconds.values()]
    assert found[: len(measured)] == pytest.approx(measured)
    assert found[1:] == sorted(found[1:])
    longer = seconds(config, device, samples=4 * samples, seq_len=seq_len)
    assert all(one < more < 4 * one for one, more in zip(found, longer, strict=True))


def test_a_faster_machine_and_more_cores_take_less() -> None:
    once, twice, cores = (seconds(SMALL, "cpu", faster=faster, cores=n) for faster, n in ((1, 1), (2, 1), (1, 2)))
    assert twice == pytest.approx([each / 2 for each in once])
    assert twice == cores


def test_mixtures_take_the_launches_of_each_column() -> None:
    """9.82 s a layer were measured; products alone would take 0.4."""
    assert seconds(MIXTURE, "cuda")[0] / 2 == pytest.approx(9.82, rel=0.05)
    costs = recipe_costs(MIXTURE, QuantSpec(device="cuda"), rate=1e14, cores=1)
    assert [cost.measured for cost in costs] == [True, False, False, False]


def test_the_speed_of_a_matrix_product_is_measured() -> None:
    assert 1e8 < machine_rate("cpu") < 1e13
