"""Rules for single modules: what has no codes, or other codes, is named as engines look it up, and nothing else."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.linears import decoder_linears
from qwen_pipeline.transforms.codes.gptq import gptq_format
from qwen_pipeline.transforms.codes.module_rules import declared_format, excluding_rule
from qwen_pipeline.transforms.codes.packed import quantized_checkpoint
from qwen_pipeline_tests.in_memory import checkpoint_of
from qwen_pipeline_tests.layouts import layouts_of
from qwen_pipeline_tests.tiny import LANGUAGE_FAMILIES, load_tiny, tiny_model

SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 32}
DRAFTED = [family for family in LANGUAGE_FAMILIES if "mtp" in layouts_of(family)]


def quantized(source: Checkpoint, **settings: Any) -> Checkpoint:
    """Return a checkpoint with (arbitrary) codes, of the precisions of a spec with these settings."""
    linears = decoder_linears(source)
    spec = QuantSpec(group_size=32, device="cpu", threads=1, **settings).for_model(source.config)
    forms, form = spec.forms(linear.module for linear in linears), gptq_format({"quantization_config": SETTINGS})
    codes = {
        f"{linear.module}.{code}": torch.zeros(tensor.shape, dtype=tensor.torch_dtype)
        for linear in linears
        if spec.precision_of(linear.module).coded
        for code, tensor in forms.get(linear.module, form).code_specs(linear.out_features, linear.in_features).items()
    }
    return quantized_checkpoint(source, checkpoint_of(codes, {}, shard="packed"), linears, SETTINGS, forms)


@pytest.mark.parametrize("family", LANGUAGE_FAMILIES)
def test_the_rules_divide_the_linear_layers_of_a_model_in_memory(family: str, tmp_path: Path) -> None:
    """The oracle is the list of ``nn.Linear`` that Transformers builds."""
    root = tiny_model(family, tmp_path / "model")
    source = open_checkpoint(root)
    config = quantized(source).config["quantization_config"]
    coded = {linear.kind: linear for linear in decoder_linears(source)}
    linears = [name for name, module in load_tiny(root).named_modules() if isinstance(module, nn.Linear)]
    assert linears
    for name in linears:
        kind = re.sub(r".*?layers\.\d+\.", "", name)
        has_codes = kind in coded and not re.search(r"visual|audio_tower|talker|token2wav|code2wav", name)
        if not name.endswith("lm_head"):
            assert (excluding_rule(config, name) is None) == has_codes, name
    for linear in decoder_linears(source):
        assert excluding_rule(config, linear.module) is None


def test_a_dense_model_has_no_rules(tmp_path: Path) -> None:
    output = quantized(open_checkpoint(tiny_model("qwen3", tmp_path / "model")))
    assert output.config["quantization_config"] == SETTINGS


@pytest.mark.parametrize(
    ("family", "without"), [("qwen3_5", ["in_proj_a", "in_proj_b"]), ("qwen2_moe", ["shared_expert_gate"])]
)
def test_what_has_codes_is_listed_if_a_family_has_linear_layers_without(
    family: str, without: list[str], tmp_path: Path
) -> None:
    """Without the list, Optimum, which does not read ``dynamic``, expects codes for every ``nn.Linear`` of a layer."""
    source = open_checkpoint(tiny_model(family, tmp_path / "model"))
    (listed,) = quantized(source).config["quantization_config"]["modules_in_block_to_quantize"]
    assert listed == list(dict.fromkeys(each.kind for each in decoder_linears(source) if not each.is_expert))
    assert not any(name in kind for name in without for kind in listed)


@pytest.mark.parametrize("family", DRAFTED)
def test_a_draft_head_is_excluded_by_the_rule_that_vllm_looks_for(family: str, tmp_path: Path) -> None:
    """A key that begins with ``-:`` and contains ``mtp`` makes vLLM build draft layers unquantized (vLLM#48816)."""
    source = open_checkpoint(tiny_model(family, tmp_path / "model", layout="mtp"))
    config = quantized(source).config["quantization_config"]
    assert any(key.startswith("-:") and "mtp" in key for key in config["dynamic"])
    assert excluding_rule(config, "model.mtp.layers.0.mlp.experts")
    if "in_proj_a" in str(list(source)):
        assert excluding_rule(config, "model.layers.0.linear_attn.in_proj_ba"), "the fused layer of SGLang and vLLM"


def test_a_layer_without_codes_is_named_with_its_number_if_others_of_its_kind_have_them(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model("qwen3", tmp_path / "model"))
    config = quantized(source, modules={r"layers\.1\.mlp\.down_proj": "keep"}).config["quantization_config"]
    assert config["dynamic"] == {r"-:.*\.layers\.1\.mlp\.down_proj$": {}}
    (looked_up,) = config["modules_in_block_to_quantize"]
    assert "layers.0.mlp.down_proj" in looked_up
    assert "self_attn.q_proj" in looked_up
    assert not any("layers.1.mlp.down_proj".endswith(name) for name in looked_up)


def test_codes_of_other_formats_are_named_after_what_has_none(tmp_path: Path) -> None:
    """A draft head ends as decoder layers do, so the first match must be its exclusion."""
    source = open_checkpoint(tiny_model("qwen3_5_moe", tmp_path / "model", layout="mtp"))
    output = quantized(source, modules={r"layers\.1\.self_attn\.": "8", r"linear_attn\.": "keep", r"experts": 8})
    settings = output.config["quantization_config"]
    form = gptq_format(output.config)
    prefixes = [rule[:2] for rule in settings["dynamic"]]
    assert prefixes == sorted(prefixes, reverse=True), "- comes after + in ASCII"
    eight = replace(form, bits=8)
    declared = {
        "model.language_model.layers.1.self_attn.q_proj": eight,
        "language_model.model.layers.1.self_attn.qkv_proj": eight,
        "model.layers.0.linear_attn.in_proj_qkvz": None,
        "model.layers.0.mlp.experts": eight,
        "model.layers.0.mlp.shared_expert.gate_up_proj": form,
        "mtp.layers.1.self_attn.qkv_proj": None,
        "mtp.layers.0.mlp.experts": None,
    }
    assert {module: declared_format(settings, module, form) for module in declared} == declared
    for linear in decoder_linears(source):
        own = declared_format(settings, linear.module, form)
        assert own == (form.of(output, linear.module) if f"{linear.module}.qweight" in output else None)


def test_the_official_precisions_of_a_family_are_those_of_its_releases(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model("qwen3_5_moe", tmp_path / "model"))
    output = quantized(source, precision="official")
    official = [r".*attn.*", r".*shared_expert.*", r".*mtp.*", r".*visual.*"]
    for linear in decoder_linears(source):
        kept = any(re.match(pattern, linear.module) for pattern in official)
        assert (f"{linear.module}.qweight" not in output) == kept, linear.module
    plain = open_checkpoint(tiny_model("qwen3", tmp_path / "plain"))
    assert quantized(plain, precision="official").config == quantized(plain).config


def test_the_format_of_a_layer_follows_from_its_shapes() -> None:
    form = gptq_format({"quantization_config": SETTINGS})
    for bits, group_size in product((4, 8), (32, 64, 128)):
        own = replace(form, bits=bits, group_size=group_size)
        codes = {
            f"a.{code}": torch.zeros(spec.shape, dtype=spec.torch_dtype)
            for code, spec in own.code_specs(96, 256).items()
        }
        for declared in (own, replace(own, bits=12 - bits), replace(own, group_size=32)):
            assert declared.of(checkpoint_of(codes, {}), "a") == own
    assert form.of(checkpoint_of({}, {}), "a") == form
