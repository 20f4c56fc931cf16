"""Models with towers and a draft head: their language model released alone, and every form of fine-tune to the end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_pipeline.checkpoint.lazy import CONFIG, Checkpoint, open_checkpoint
from qwen_pipeline.cli.inspect import inspect
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.limits import Limits
from qwen_pipeline.models.base_names import KnownBase
from qwen_pipeline.models.open import materialize
from qwen_pipeline.qwen.config import diff_configs
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.qwen.text_only import language_model
from qwen_pipeline.reports import load_reports
from qwen_pipeline.stages.merge import merge
from qwen_pipeline.stages.merge_pad import merge_pad
from qwen_pipeline.stages.pad import pad
from qwen_pipeline.transforms.codes.base_weights import BaseWeights
from qwen_pipeline_tests.chain import checks_of, continue_chain, validate_chain
from qwen_pipeline_tests.oracles import language_logits
from qwen_pipeline_tests.tiny import LANGUAGE_FAMILIES, load_tiny, tiny_adapter, tiny_model

TEXT_ONLY = BaseWeights(text_only=True)
SPEC = PaddingSpec(group_size=32, tensor_parallel=2)
ALONE = {"qwen2_audio", "qwen3_5", "qwen3_5_moe", "qwen3_asr", "qwen4_exp"}
"""Composite families whose language model Transformers has a class for."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tiny_model("qwen3_5", tmp_path_factory.mktemp("base"), layout="mtp")
    (root / "preprocessor_config.json").write_text("{}")
    return root


def tuned(base: Path, root: Path, form: str) -> Path:
    """Save a fine-tune of ``base`` in one of three forms: an adapter, the whole model, or its language model."""
    if form == "adapter":
        return tiny_adapter(base, root, target_modules=r".*\.(q_proj|down_proj|linear_fc1)")
    model: Any = load_tiny(base, torch.bfloat16)
    if form == "text":
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(root)
    return root


def drafts(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.load(name) for name in checkpoint if name.startswith("mtp.")}


@pytest.mark.parametrize(
    "form", ["text", *(pytest.param(form, marks=pytest.mark.slow) for form in ("adapter", "whole"))]
)
def test_the_language_model_of_a_merge_is_what_transformers_loads_of_it(base: Path, tmp_path: Path, form: str) -> None:
    fine_tune = tuned(base, tmp_path / "tuned", form)
    whole = merge(base=base, fine_tune=fine_tune, destination=tmp_path / "whole")
    alone = merge(base=base, fine_tune=fine_tune, destination=tmp_path / "alone", base_weights=TEXT_ONLY)
    loaded: list[Any] = [
        AutoModelForCausalLM.from_pretrained(root.path, dtype=torch.float64, output_loading_info=True)
        for root in (whole, alone)
    ]
    theirs, ours = loaded
    assert not any(ours[1].values())
    assert torch.equal(language_logits(ours[0]), language_logits(theirs[0]))
    theirs[0].to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    found, source = open_checkpoint(alone.path), open_checkpoint(base)
    assert diff_configs(json.loads((tmp_path / "theirs" / CONFIG).read_bytes()), found.config) == {}
    assert found.config["architectures"] == ["Qwen3_5ForCausalLM"]
    assert len(drafts(source)) > 5
    assert all(torch.equal(found.load(name), tensor) for name, tensor in drafts(source).items())
    assert "preprocessor_config.json" not in found.sidecars
    assert AutoTokenizer.from_pretrained(alone.path).chat_template
    checks = {report.name: report for report in load_reports(alone.manifest.result)}
    changed = {"adapter": 2, "whole": 21, "text": 0}[form]
    assert f"vision (21 tensors, {changed} of them changed)" in checks["every_tensor_is_used"].detail
    assert "vision" not in checks["carried_from_base"].detail
    assert checks["config_matches_weights"].passed
    assert inspect(fine_tune, base=base, text_only=True).data["left_out"] == 21

    recipe, padded = merge_pad(
        base=KnownBase(root=base, weights=TEXT_ONLY),
        fine_tune=fine_tune,
        merged=tmp_path / "recipe",
        padded=tmp_path / "padded",
        spec=SPEC,
    )
    two_passes = pad(source=alone.path, destination=tmp_path / "two-passes", spec=SPEC)
    assert padded.manifest.content_digest == two_passes.manifest.content_digest
    assert materialize(recipe.path).manifest.content_digest == alone.manifest.content_digest


def test_a_family_without_a_class_for_its_language_model_is_refused(tmp_path: Path) -> None:
    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    for family in LANGUAGE_FAMILIES:
        config = transformers.AutoConfig.for_model(family).to_dict()
        checkpoint = Checkpoint(config=config, tensors={}, shards={})
        if family in ALONE:
            kind = language_model(checkpoint).config
            assert known[kind["model_type"]] == kind["architectures"][0]
        elif "text_config" in config or "thinker_config" in config:
            with pytest.raises(InputRefused, match=f"the language model of {family} alone"):
                language_model(checkpoint)
        else:
            assert language_model(checkpoint) is checkpoint


def test_a_padded_base_is_refused(base: Path, tmp_path: Path) -> None:
    padded = pad(source=base, destination=tmp_path / "padded", spec=SPEC).path
    adapter = tiny_adapter(padded, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(InputRefused, match="is padded") as refusal:
        merge(base=padded, fine_tune=adapter, destination=tmp_path / "out", base_weights=TEXT_ONLY)
    assert "unpad" in refusal.value.remedy
    merged = merge(base=base, fine_tune=adapter, destination=tmp_path / "out", base_weights=TEXT_ONLY, padded=padded)
    assert open_checkpoint(merged.path).config["model_type"] == "qwen3_5_text"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["adapter", "whole", "text"])
def test_every_form_of_a_fine_tune_ends_validated_with_its_draft_head(base: Path, tmp_path: Path, form: str) -> None:
    weights = TEXT_ONLY if form == "text" else BaseWeights()
    fine_tune = tuned(base, tmp_path / "tuned", form)
    merge(base=base, fine_tune=fine_tune, destination=tmp_path / "merged", base_weights=weights)
    chain = continue_chain(tmp_path)
    outcomes = checks_of(
        validate_chain(chain, tmp_path / "validated", base=base, prompts=["Hi"], limits=Limits(max_mean_kl=9))
    )
    for name in ("loads_in_transformers", "structure", "padding_is_silent", "ranks_agree"):
        assert outcomes[name].passed, outcomes[name].detail
    before, after = drafts(open_checkpoint(chain.padded)), drafts(open_checkpoint(chain.quantized))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
