"""The merge stage with full fine-tunes, and what is settled in configs before anything is written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qwen_pipeline.checkpoint.lazy import CONFIG, SINGLE_SHARD, open_checkpoint
from qwen_pipeline.checkpoint.store.destinations import Artifact
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.models.open import materialize, open_model
from qwen_pipeline.quantization.calibration.spec import CalibrationSpec
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.reports import CheckReport, load_reports
from qwen_pipeline.stages import merge as merge_stage
from qwen_pipeline.stages import pad as pad_stage
from qwen_pipeline.stages.calibrate import calibrate
from qwen_pipeline.stages.merge import merge
from qwen_pipeline.stages.merge_pad import merge_pad
from qwen_pipeline.stages.pad import pad
from qwen_pipeline.stages.unpad import unpad
from qwen_pipeline_tests.layouts import fused_copy
from qwen_pipeline_tests.oracles import language_logits
from qwen_pipeline_tests.tiny import load_tiny, tiny_adapter, tiny_model, tiny_qwen2

SPEC = PaddingSpec(group_size=32, tensor_parallel=2)


def reports_of(artifact: Artifact) -> dict[str, CheckReport]:
    reports = load_reports(artifact.manifest.result)
    stage = merge_stage if artifact.manifest.derivation.stage == "merged" else pad_stage
    assert [report.name for report in reports] == [check.name for check in stage.CHECKS]
    return {report.name: report for report in reports}


def edit_config(root: Path, **values: Any) -> None:
    config = json.loads((root / CONFIG).read_bytes())
    (root / CONFIG).write_text(json.dumps(config | values))


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
def test_a_draft_head_that_transformers_drops_is_carried_through_merging_and_padding(
    family: str, tmp_path: Path
) -> None:
    base = tiny_model(family, tmp_path / "base", layout="mtp")
    model = load_tiny(base, torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.full_like(parameter, 2**-6))
    model.save_pretrained(tmp_path / "tuned")
    assert not any(name.startswith("mtp") for name in open_checkpoint(tmp_path / "tuned"))

    merged = merge(base=base, fine_tune=tmp_path / "tuned", destination=tmp_path / "merged")
    padded = pad(source=merged.path, destination=tmp_path / "padded", spec=SPEC)
    drafts = {name: tensor for name, tensor in load_file(base / SINGLE_SHARD).items() if name.startswith("mtp.")}
    assert drafts
    assert merged.manifest.result["carried"] == {"mtp": len(drafts)}
    report = reports_of(merged)["carried_from_base"]
    assert (report.outcome, report.measured) == ("warning", f"mtp ({len(drafts)} tensors)")
    stored, live = load_file(padded.path / SINGLE_SHARD), load_file(merged.path / SINGLE_SHARD)
    for name, tensor in drafts.items():
        assert torch.equal(live[name], tensor)
        assert torch.equal(stored[name], tensor) or ".mlp." in name
    restored = load_file(unpad(source=padded.path, destination=tmp_path / "unpadded").path / SINGLE_SHARD)
    assert all(torch.equal(restored[name], tensor) for name, tensor in drafts.items())
    ours = language_logits(load_tiny(merged.path, torch.float64))
    assert torch.equal(ours, language_logits(load_tiny(tmp_path / "tuned", torch.float64)))


def test_one_pass_and_a_recipe_give_the_digests_of_two_stages(tmp_path: Path) -> None:
    base = tiny_model("qwen3_5_moe", tmp_path / "base", layout="mtp")
    tuned = tiny_model("qwen3_5_moe", tmp_path / "tuned", layout="fused", seed=5)
    merged = merge(base=base, fine_tune=tuned, destination=tmp_path / "merged")
    padded = pad(source=merged.path, destination=tmp_path / "padded", spec=SPEC)
    recipe, once = merge_pad(
        base=base, fine_tune=tuned, merged=tmp_path / "recipe", padded=tmp_path / "once", spec=SPEC
    )
    assert recipe.manifest.content_digest == merged.manifest.content_digest
    assert once.manifest.content_digest == padded.manifest.content_digest
    assert recipe.manifest.result == merged.manifest.result
    names = set(open_model(recipe.path))
    assert names == set(open_checkpoint(merged.path))
    assert materialize(recipe.path).manifest.content_digest == merged.manifest.content_digest


def test_an_untied_fine_tune_of_a_tied_base_is_taken_and_so_is_an_own_merge(tmp_path: Path) -> None:
    base, tuned = tiny_qwen2(tmp_path / "base", tie=True), tiny_qwen2(tmp_path / "tuned", seed=5)
    merged = merge(base=base, fine_tune=tuned, destination=tmp_path / "merged")
    assert load_file(merged.path / SINGLE_SHARD).keys() == load_file(tuned / SINGLE_SHARD).keys()
    assert all(report.passed for report in reports_of(merged).values())
    adapter = tiny_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    first = merge(base=base, fine_tune=adapter, destination=tmp_path / "first")
    second = merge(base=base, fine_tune=first.path, destination=tmp_path / "second")
    assert second.manifest.content_digest == first.manifest.content_digest


def test_a_trained_head_is_kept_where_the_config_says_that_it_is_tied(tmp_path: Path) -> None:
    base, tuned = tiny_qwen2(tmp_path / "base", tie=True), tiny_qwen2(tmp_path / "tuned", seed=5, dtype=torch.float32)
    edit_config(tuned, tie_word_embeddings=True)
    head = load_file(tuned / SINGLE_SHARD)["lm_head.weight"]
    merged = merge(base=base, fine_tune=tuned, destination=tmp_path / "merged")
    report = reports_of(merged)["config_matches_weights"]
    assert report.outcome == "warning"
    assert "tie_word_embeddings false: the stored lm_head.weight is not" in report.detail
    assert json.loads((merged.path / CONFIG).read_bytes())["tie_word_embeddings"] is False

    adapter = tiny_adapter(tuned, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    again = merge(base=tuned, fine_tune=adapter, destination=tmp_path / "again")
    assert torch.equal(load_file(again.path / SINGLE_SHARD)["lm_head.weight"], head)
    model: Any = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float64)
    peft: Any = PeftModel.from_pretrained(model, str(adapter))
    ours, theirs = (language_logits(each) for each in (load_tiny(again.path, torch.float64), peft.base_model.model))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4)
    assert not torch.allclose(ours, language_logits(load_tiny(tuned, torch.float64)), rtol=0, atol=1)


def test_what_padding_settles_is_undone_by_unpadding(tmp_path: Path) -> None:
    live = tiny_qwen2(tmp_path / "live", seed=5)
    edit_config(live, tie_word_embeddings=True, quantization_config={"quant_method": "bitsandbytes"})
    for spec in (SPEC, PaddingSpec(group_size=32, tensor_parallel=1)):
        padded = pad(source=live, destination=tmp_path / f"padded-{spec.tensor_parallel}", spec=spec)
        report = reports_of(padded)["config_matches_weights"]
        assert report.measured == 2
        config = json.loads((padded.path / CONFIG).read_bytes())
        assert config["tie_word_embeddings"] is False
        assert "quantization_config" not in config
        unpadded = unpad(source=padded.path, destination=tmp_path / f"unpadded-{spec.tensor_parallel}")
        assert all(report.passed for report in load_reports(unpadded.manifest.result))


def test_buffers_are_left_behind_alike(tmp_path: Path) -> None:
    clean, base = tiny_qwen2(tmp_path / "clean", seed=5), tiny_qwen2(tmp_path / "base")
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(load_file(base / SINGLE_SHARD) | buffer, base / SINGLE_SHARD, metadata={"format": "pt"})
    adapter = tiny_adapter(clean, tmp_path / "adapter")
    outputs = {
        "adapter": merge(base=base, fine_tune=adapter, destination=tmp_path / "m1"),
        "full": merge(base=clean, fine_tune=base, destination=tmp_path / "m2"),
        "full into it": merge(base=base, fine_tune=clean, destination=tmp_path / "m3"),
        "padded": pad(source=base, destination=tmp_path / "p", spec=SPEC),
    }
    for name, artifact in outputs.items():
        assert set(open_checkpoint(artifact.path)) == set(open_checkpoint(clean)), name
        assert ("inv_freq" in reports_of(artifact)["config_matches_weights"].detail) == (name != "full into it")
    (report,) = load_reports(unpad(source=tmp_path / "p", destination=tmp_path / "u").manifest.result)
    assert report.skipped
    assert "inv_freq" in report.detail


def test_fused_matrices_are_merged_and_padded_as_the_layers_that_they_hold(tmp_path: Path) -> None:
    base, tuned = tiny_qwen2(tmp_path / "base"), tmp_path / "tuned"
    shutil.copytree(base, tuned)
    tensors = {name: tensor + 2**-5 for name, tensor in load_file(base / SINGLE_SHARD).items()}
    save_file(tensors, tuned / SINGLE_SHARD, metadata={"format": "pt"})
    adapter = tiny_adapter(base, tmp_path / "adapter")
    fused_base = fused_copy(base, tmp_path / "fused-base")
    grouped = fused_copy(tuned, tmp_path / "grouped", groups=2, is_swapped=True)
    expected = {
        "full": merge(base=base, fine_tune=tuned, destination=tmp_path / "m0"),
        "adapter": merge(base=base, fine_tune=adapter, destination=tmp_path / "a0"),
        "padded": pad(source=base, destination=tmp_path / "p0", spec=SPEC),
    }
    for name, artifact in {
        "full": merge(base=base, fine_tune=grouped, destination=tmp_path / "m1"),
        "full into it": merge(base=fused_base, fine_tune=tuned, destination=tmp_path / "m2"),
        "full, both": merge(base=fused_base, fine_tune=grouped, destination=tmp_path / "m3"),
        "adapter into it": merge(base=fused_base, fine_tune=adapter, destination=tmp_path / "a1"),
        "padded": pad(source=fused_base, destination=tmp_path / "p1", spec=SPEC),
    }.items():
        theirs = expected[name.partition(" ")[0].strip(",")]
        assert artifact.manifest.content_digest == theirs.manifest.content_digest, name
        report = reports_of(artifact)["config_matches_weights"]
        assert not report.passed
        assert "self_attn.qkv_proj split (4 tensors)" in report.detail
        assert ("in the base, self_attn" in report.detail) == (name in ("full into it", "full, both"))
    (report,) = load_reports(unpad(source=tmp_path / "p1", destination=tmp_path / "u").manifest.result)
    assert report.skipped
    assert "qkv_proj split" in report.detail

    recipe, once = merge_pad(
        base=fused_base, fine_tune=grouped, merged=tmp_path / "recipe", padded=tmp_path / "once", spec=SPEC
    )
    lazy = open_model(recipe.path)
    assert all(torch.equal(lazy.load(name), tensor) for name, tensor in tensors.items())
    twice = pad(source=expected["full"].path, destination=tmp_path / "twice", spec=SPEC)
    assert once.manifest.content_digest == twice.manifest.content_digest


def test_a_base_without_the_prefix_of_its_decoder_is_merged_into_and_padded(tmp_path: Path) -> None:
    """Published embedding models are saved without ``model.``."""
    base = tiny_model("qwen3", tmp_path / "base", layout="bare", tie=True)
    adapter = tiny_adapter(base, tmp_path / "adapter")
    merged = merge(base=base, fine_tune=adapter, destination=tmp_path / "merged")
    padded = pad(source=merged.path, destination=tmp_path / "padded", spec=SPEC)
    assert set(open_checkpoint(padded.path)) == set(open_checkpoint(base))
    published = tiny_model("qwen3", tmp_path / "published", tie=True)
    theirs = merge(base=published, fine_tune=adapter, destination=tmp_path / "theirs")
    ours, expected = (language_logits(load_tiny(each.path, torch.float64)) for each in (merged, theirs))
    assert torch.equal(ours, expected)


def test_a_head_that_is_neither_stored_nor_tied_is_refused_at_once(tmp_path: Path) -> None:
    base = tiny_qwen2(tmp_path / "base", tie=True)
    adapter = tiny_adapter(base, tmp_path / "adapter")
    edit_config(base, tie_word_embeddings=False)
    with pytest.raises(CheckpointRefused, match="no output head"):
        merge(base=base, fine_tune=adapter, destination=tmp_path / "merged")
    with pytest.raises(CheckpointRefused, match="no output head"):
        pad(source=base, destination=tmp_path / "padded", spec=SPEC)
    assert not list(tmp_path.glob("*ed"))


def test_later_stages_refuse_what_they_would_not_settle(tmp_path: Path) -> None:
    live = tiny_qwen2(tmp_path / "live")
    edit_config(live, layer_types=["full_attention"] * 3)
    (tmp_path / "text.txt").write_text("word " * 400)
    with pytest.raises(CheckpointRefused, match="it had 3 entries for 2 layers") as refusal:
        calibrate(
            source=live,
            text=tmp_path / "text.txt",
            destination=tmp_path / "tokens",
            spec=CalibrationSpec(samples=2, seq_len=32),
        )
    assert "qwen-pipeline pad" in refusal.value.remedy
    padded = pad(source=live, destination=tmp_path / "padded", spec=SPEC)
    calibrate(
        source=padded.path,
        text=tmp_path / "text.txt",
        destination=tmp_path / "tokens",
        spec=CalibrationSpec(samples=2, seq_len=32),
    )
