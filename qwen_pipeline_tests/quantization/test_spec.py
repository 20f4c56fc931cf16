"""Specs: refused settings, conversion to JSON, and overrides."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.quantization.job import QuantJob
from qwen_pipeline.quantization.spec import QuantSpec, parse_overrides


@pytest.mark.parametrize(
    "wrong",
    [
        {"engine": "other"}, {"device": "tpu"}, {"bits": 3}, {"group_size": 0}, {"group_size": -1}, {"samples": 0},
        {"seq_len": 0}, {"batch_size": 0}, {"threads": 0}, {"damp_percent": 0.0}, {"damp_percent": 1.0}, {"mse": -1.0},
        {"mse": 2.4, "engine": "autogptq"}, {"packing": "both"}, {"packing": "documents", "engine": "autogptq"},
        {"all_experts": True, "engine": "autogptq"}, {"dynamic": {"a": {"mse": 2.0}}, "engine": "autogptq"},
        {"act_group_aware": False, "engine": "autogptq"},
        {"gpus": 0, "device": "cuda"}, {"gpus": 2, "device": "cpu"},
        {"gpus": 2, "device": "cuda", "engine": "layerwise"}, {"dynamic": {"down": {"bits": 8}}},
        {"recipe": "other"}, {"recipe": "fast", "engine": "gptqmodel"}, {"recipe": "fast", "sym": False},
        {"recipe": "best", "desc_act": True}, {"recipe": "balanced", "mse": 2.4},
        {"recipe": "fast", "dynamic": {"a": {"mse": 2.4}}},
        {"dynamic": {"(": {"mse": 2.0}}}, {"dynamic": {"a": {"damp_percent": 1.0}}},
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_setting_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputRefused, match="(?i)" + "|".join(wrong)) as caught:
        QuantSpec(**wrong)
    assert caught.value.remedy


def test_a_job_can_be_restored_from_json() -> None:
    spec = QuantSpec(bits=8, desc_act=True, threads=3, device="cuda")
    job = QuantJob(spec=spec, source=Path("/a"), windows=Path("/b.npy"), work_dir=Path("/c"))
    assert QuantJob.from_json(json.loads(json.dumps(job.to_json()))) == job


def test_every_setting_is_in_the_json() -> None:
    base = QuantSpec(engine="gptqmodel", threads=2, device="cpu")
    others = [
        replace(base, seed=1),
        replace(base, threads=1),
        replace(base, batch_size=1),
        replace(base, device="cuda"),
        replace(base, device="cuda", gpus=2),
    ]
    assert len({json.dumps(spec.to_json(), sort_keys=True) for spec in (base, *others)}) == 6


def test_the_recipe_gptq_is_left_out_of_the_json_so_that_its_digests_stay() -> None:
    plain, fast = QuantSpec(threads=2, device="cpu"), QuantSpec(recipe="fast", threads=2, device="cpu")
    assert "recipe" not in plain.to_json()
    assert "recipe" not in plain.quantization_config("a")["meta"]
    assert fast.to_json() == {**plain.to_json(), "recipe": "fast"}
    assert fast.quantization_config("a")["meta"]["recipe"] == "fast"
    assert QuantSpec(**fast.to_json()) == fast


def test_the_first_matching_override_counts() -> None:
    spec = QuantSpec(dynamic={r"\.1\.mlp": {"mse": 2.0}, "down_proj": {"damp_percent": 0.1}})
    assert spec.override("model.layers.1.mlp.down_proj") == {"mse": 2.0}
    assert spec.override("model.layers.0.mlp.down_proj") == {"damp_percent": 0.1}
    assert spec.override("model.layers.0.mlp.up_proj") == {}


def test_overrides_are_parsed() -> None:
    assert parse_overrides([r"(?:up|gate):mse=2.4, damp_percent=0.1", "q:mse=0"]) == {
        "(?:up|gate)": {"mse": 2.4, "damp_percent": 0.1},
        "q": {"mse": 0.0},
    }
    for wrong in ("down", "down:mse", "down:mse=much"):
        with pytest.raises(InputRefused, match="not of the form"):
            parse_overrides([wrong])
