"""Every linear layer that an engine builds and that has no codes is excluded by a rule; no layer with codes is."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.qwen.linears import decoder_linears
from qwen_pipeline.transforms.codes.exclusions import excluding_rule, exclusion_rules
from qwen_pipeline.transforms.codes.gptq import gptq_format
from qwen_pipeline.transforms.codes.packed import quantized_checkpoint
from qwen_pipeline_tests.in_memory import checkpoint_of
from qwen_pipeline_tests.layouts import layouts_of
from qwen_pipeline_tests.tiny import LANGUAGE_FAMILIES, load_tiny, tiny_model

SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 32}
DRAFTED = [family for family in LANGUAGE_FAMILIES if "mtp" in layouts_of(family)]


def quantized(source: Checkpoint, without: str = "") -> Checkpoint:
    """Return a checkpoint with (arbitrary) codes for every linear layer but those whose module has this end."""
    linears = decoder_linears(source)
    form = gptq_format({"quantization_config": SETTINGS})
    codes = {
        f"{linear.module}.{code}": torch.zeros(spec.shape, dtype=spec.torch_dtype)
        for linear in linears
        if not (without and linear.module.endswith(without))
        for code, spec in form.code_specs(linear.out_features, linear.in_features).items()
    }
    return quantized_checkpoint(source, checkpoint_of(codes, {}, shard="packed"), linears, SETTINGS)


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
    output = quantized(source, without="layers.1.mlp.down_proj")
    assert exclusion_rules(output) == {r"-:.*\.layers\.1\.mlp\.down_proj$": {}}
    assert output.config["quantization_config"]["dynamic"] == exclusion_rules(output)
