"""Loading from headers alone, compared with loading the bytes."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qwen_pipeline.evaluation.loading import place_tensors
from qwen_pipeline_tests.codes import Packing, replace_mlps_by_codes
from qwen_pipeline_tests.tiny import tiny_model
from qwen_pipeline_tests.whole import NotLoaded, load_model


@pytest.mark.parametrize(
    "family",
    [
        *("qwen2", "qwen3_moe", "qwen3_next", "qwen3_vl", "qwen3_vl_moe", "qwen3_5_moe", "qwen4_exp"),
        *("qwen2_5_omni", "qwen3_omni_moe"),
    ],
)
def test_every_tensor_of_any_family_is_loaded(tmp_path: Path, family: str) -> None:
    placement = place_tensors(tiny_model(family, tmp_path / "model"))
    assert placement.fault is None
    assert placement.unplaced is None
    assert placement.linears["Linear"] > 1


def test_loading_without_bytes_reports_the_same_as_with_them(tmp_path: Path) -> None:
    root = tiny_model("qwen3_moe", tmp_path / "model")
    file = root / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.extra.weight"] = tensors.pop("model.layers.1.self_attn.q_proj.weight")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NotLoaded) as fault:
        load_model(str(root))
    assert place_tensors(root).fault == str(fault.value)
    assert "missing_keys: model.layers.1.self_attn.q_proj.weight" in str(fault.value)
    assert "mismatched_keys" in str(fault.value)


def test_an_architecture_unknown_to_transformers_is_a_fault(tmp_path: Path) -> None:
    root = tiny_model("qwen2", tmp_path / "model")
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen99ForCausalLM"]}))
    assert "has no architecture 'Qwen99ForCausalLM'" in (place_tensors(root).fault or "")


def test_codes_without_their_settings_are_a_fault(tmp_path: Path) -> None:
    root = replace_mlps_by_codes(tiny_model("qwen3", tmp_path), Packing(method="gptq", group_size=32))
    config = json.loads((root / "config.json").read_bytes())
    for settings in ({}, {"quantization_config": {"quant_method": "gptq", "bits": "x"}}):
        kept = {field: value for field, value in config.items() if field != "quantization_config"}
        (root / "config.json").write_text(json.dumps(kept | settings))
        assert place_tensors(root).fault
