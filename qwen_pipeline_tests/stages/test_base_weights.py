"""Merging into, and padding of, quantized bases in full precision; merging onto what QLoRA trained on."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.errors import QuantizedInputRefused
from qwen_pipeline.models.base_names import KnownBase
from qwen_pipeline.models.open import materialize, open_model
from qwen_pipeline.qwen.linears import decoder_linears
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.reports import load_reports
from qwen_pipeline.stages.merge import merge
from qwen_pipeline.stages.merge_pad import merge_pad
from qwen_pipeline.stages.pad import pad
from qwen_pipeline.stages.unpad import unpad
from qwen_pipeline.transforms.codes.base_weights import BaseWeights
from qwen_pipeline.transforms.codes.dequantize import dequantized
from qwen_pipeline.transforms.codes.nf4 import rounded_to_nf4
from qwen_pipeline_tests.tiny import tiny_adapter, tiny_qwen2
from qwen_pipeline_tests.transforms.codes.test_dequantize import to_fp8

GEOMETRY = PaddingSpec(group_size=32, tensor_parallel=2)
DEQUANTIZE = BaseWeights(dequantize=True)
NF4 = BaseWeights(nf4="double")


@pytest.fixture
def full(tmp_path: Path) -> Path:
    return tiny_qwen2(tmp_path / "full")


@pytest.fixture
def adapter(full: Path, tmp_path: Path) -> Path:
    return tiny_adapter(full, tmp_path / "adapter")


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    return to_fp8(tiny_qwen2(tmp_path / "fp8"))


def expected_weight(base_weight: torch.Tensor, adapter: Path, module: str) -> torch.Tensor:
    """Return ``W + scaling * B @ A`` in float64, rounded once."""
    settings = json.loads((adapter / "adapter_config.json").read_bytes())
    factors = load_file(adapter / "adapter_model.safetensors")
    a_RI, b_OR = (factors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    return (base_weight.double() + settings["lora_alpha"] / settings["r"] * b_OR @ a_RI).to(base_weight.dtype)


def test_a_quantized_base_is_refused_and_the_remedy_works(quantized: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    with pytest.raises(QuantizedInputRefused, match="--base-dequantize"):
        merge(base=quantized, fine_tune=adapter, destination=out)
    artifact = merge(base=quantized, fine_tune=adapter, destination=out, base_weights=DEQUANTIZE)
    assert artifact.manifest.derivation.spec["base_dequantize"] is True
    merged, base = open_checkpoint(artifact.path), open_checkpoint(quantized)
    assert "quantization_config" not in merged.config
    assert not any(name.endswith("_scale_inv") for name in merged)
    for linear in decoder_linears(merged):
        weight, scale = base.load(linear.tensor).double(), base.load(f"{linear.tensor}_scale_inv").double()
        spread = scale.repeat_interleave(32, 0)[: len(weight)].repeat_interleave(32, 1)[:, : weight.shape[1]]
        found, rounded = merged.load(linear.tensor), (weight * spread).bfloat16()
        assert torch.allclose(found.double(), expected_weight(rounded, adapter, linear.module).double(), rtol=2**-7)
        assert not torch.equal(found, rounded)


def test_the_digest_of_a_quantized_base_is_that_of_its_codes(quantized: Path, adapter: Path, tmp_path: Path) -> None:
    first = merge(base=quantized, fine_tune=adapter, destination=tmp_path / "a", base_weights=DEQUANTIZE)
    second = merge(base=quantized, fine_tune=adapter, destination=tmp_path / "b", base_weights=DEQUANTIZE)
    assert first.manifest.derivation.inputs == second.manifest.derivation.inputs
    assert first.manifest.content_digest == second.manifest.content_digest


def test_asking_for_full_precision_changes_nothing_for_a_full_base(full: Path, adapter: Path, tmp_path: Path) -> None:
    plain = merge(base=full, fine_tune=adapter, destination=tmp_path / "a")
    asked = merge(base=full, fine_tune=adapter, destination=tmp_path / "b", base_weights=DEQUANTIZE)
    assert plain.manifest.derivation.key == asked.manifest.derivation.key


@pytest.mark.parametrize("weights", [DEQUANTIZE, NF4], ids=["dequantized", "nf4"])
def test_one_pass_and_two_have_the_same_digests(
    weights: BaseWeights, full: Path, quantized: Path, adapter: Path, tmp_path: Path
) -> None:
    base = full if weights.nf4 else quantized
    stored = merge(base=base, fine_tune=adapter, destination=tmp_path / "merged", base_weights=weights)
    padded = pad(source=stored.path, destination=tmp_path / "padded", spec=GEOMETRY)
    recipe, one_pass = merge_pad(
        base=KnownBase(root=base, weights=weights),
        fine_tune=adapter,
        merged=tmp_path / "recipe",
        padded=tmp_path / "one-pass",
        spec=GEOMETRY,
    )
    assert recipe.manifest.content_digest == stored.manifest.content_digest
    assert one_pass.manifest.content_digest == padded.manifest.content_digest
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(open_model(recipe.path).load(name), open_checkpoint(stored.path).load(name))
    assert materialize(recipe.path).manifest.content_digest == stored.manifest.content_digest


def test_a_quantized_checkpoint_is_padded_in_full_precision(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizedInputRefused, match="--base-dequantize"):
        pad(source=quantized, destination=tmp_path / "padded", spec=GEOMETRY)
    padded = pad(source=quantized, destination=tmp_path / "padded", spec=GEOMETRY, dequantize=True)
    unpadded = unpad(source=padded.path, destination=tmp_path / "unpadded")
    (report,) = load_reports(unpadded.manifest.result)
    assert report.skipped
    expected, found = dequantized(open_checkpoint(quantized)), open_checkpoint(unpadded.path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found.load(name), expected.load(name)) for name in expected)


def test_a_merge_onto_nf4_starts_from_what_qlora_trained_on(full: Path, adapter: Path, tmp_path: Path) -> None:
    artifact = merge(base=full, fine_tune=adapter, destination=tmp_path / "merged", base_weights=NF4)
    assert artifact.manifest.derivation.spec["base_nf4"] == "double"
    merged, start = open_checkpoint(artifact.path), rounded_to_nf4(open_checkpoint(full), "double")
    for linear in decoder_linears(merged):
        expected = expected_weight(start.load(linear.tensor), adapter, linear.module)
        assert torch.allclose(merged.load(linear.tensor).double(), expected.double(), rtol=2**-7)
    kept = {name for name in merged if name not in {linear.tensor for linear in decoder_linears(merged)}}
    assert all(torch.equal(merged.load(name), start.load(name)) for name in kept)
