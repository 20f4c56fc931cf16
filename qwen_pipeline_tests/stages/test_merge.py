"""The merge stage: Transformers loads the weights that PEFT merges, also after a kill and a resumed run."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from qwen_pipeline.checkpoint.digest import hash_checkpoint
from qwen_pipeline.checkpoint.digest_cache import checkpoint_digest
from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.store.destinations import Artifact
from qwen_pipeline.checkpoint.store.verify import require_intact
from qwen_pipeline.errors import AdapterRefused, CheckFailed, InputRefused
from qwen_pipeline.models.open import fine_tune_digest
from qwen_pipeline.reports import CheckReport, load_reports
from qwen_pipeline.stages.merge import CHECKS, merge
from qwen_pipeline.transforms.lora.adapter import ADAPTER_WEIGHTS
from qwen_pipeline_tests.oracles import logits, peft_merge
from qwen_pipeline_tests.tiny import VISION, tiny_adapter, tiny_qwen2, tiny_qwen3, tiny_vl

KILLED = "qwen_pipeline_tests.stages.killed_stage"


def reports_of(artifact: Artifact) -> dict[str, CheckReport]:
    reports = load_reports(artifact.manifest.result)
    assert [report.name for report in reports] == [check.name for check in CHECKS]
    return {report.name: report for report in reports}


def test_an_adapter_merges_into_a_checkpoint_that_transformers_loads(tmp_path: Path) -> None:
    base = tiny_qwen3(tmp_path / "base", tie=True, shards=3)
    adapter = tiny_adapter(base, tmp_path / "adapter", alpha_pattern={"q_proj": 32})
    merged = merge(base=base, fine_tune=adapter, destination=tmp_path / "merged")

    theirs = peft_merge(base, adapter, dtype=torch.bfloat16)
    for shard in set(open_checkpoint(base).shards.values()):
        ours = load_file(merged.path / shard)
        assert all(torch.allclose(ours[name].float(), theirs[name].float(), rtol=2**-7, atol=1e-6) for name in ours)
    assert logits(merged.path).isfinite().all()
    assert (merged.path / "config.json").read_bytes() == (base / "config.json").read_bytes()
    require_intact(merged.path)

    result = merged.manifest.result
    assert result["kind"] == "adapter"
    assert result["scalings"]["model.layers.1.self_attn.q_proj.weight"] == [8.0]
    assert result["scalings"]["model.layers.1.mlp.up_proj.weight"] == [2.0]
    reports = reports_of(merged)
    assert all(report.passed for report in reports.values())
    assert reports["every_tensor_is_used"].measured == "28 of 28"
    assert merge(base=base, fine_tune=adapter, destination=tmp_path / "merged").reused


@pytest.mark.parametrize("family", VISION)
def test_an_adapter_of_a_vision_language_model_matches_the_published_names(tmp_path: Path, family: str) -> None:
    base = tiny_vl(family, tmp_path / "base")
    model = AutoModelForImageTextToText.from_pretrained(base)
    peft = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "qkv", "down_proj"], init_lora_weights=False)
    )
    peft.save_pretrained(str(tmp_path / "adapter"))
    merged = merge(base=base, fine_tune=tmp_path / "adapter", destination=tmp_path / "merged")

    theirs = peft.merge_and_unload().state_dict()
    ours = AutoModelForImageTextToText.from_pretrained(merged.path).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-6) for name in ours)
    assert any("visual" in name for name in merged.manifest.result["scalings"])


def test_a_full_fine_tune_passes_through(tmp_path: Path) -> None:
    base = tiny_qwen2(tmp_path / "base", shards=3)
    tuned = tiny_qwen2(tmp_path / "tuned", seed=9, dtype=torch.float32)
    (tuned / "chat_template.jinja").write_text("ours")
    (tuned / "generation_config.json").unlink()
    merged = merge(base=base, fine_tune=tuned, destination=tmp_path / "merged")

    ours = hash_checkpoint(open_checkpoint(merged.path), merged.path)
    assert ours.tensors == hash_checkpoint(open_checkpoint(tuned), tuned).tensors
    assert (merged.path / "chat_template.jinja").read_text() == "ours"
    assert (merged.path / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert merged.manifest.result["kind"] == "full"
    assert all(report.passed for report in reports_of(merged).values())
    assert fine_tune_digest(tuned) == checkpoint_digest(tuned)


@pytest.mark.parametrize(
    ("declared", "base_names", "passed", "severity"),
    [
        ("{base}", [], True, "WARN"),
        ("elsewhere/base", [], True, "WARN"),
        ("Qwen/Other", [], False, "WARN"),
        (None, [], False, "WARN"),
        ("Qwen/Known", ["Qwen/Known"], True, "ERROR"),
        ("{base}", ["Qwen/Known"], True, "ERROR"),
        ("elsewhere/base", ["Qwen/Known"], False, "ERROR"),
        (None, ["Qwen/Known"], False, "ERROR"),
    ],
)
def test_the_adapter_must_name_its_base(
    tmp_path: Path, declared: str | None, base_names: list[str], passed: bool, severity: str
) -> None:
    base = tiny_qwen2(tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = declared and declared.format(base=base)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merged = merge(base=base, fine_tune=adapter, destination=tmp_path / "merged", base_names=base_names)
    report = reports_of(merged)["base_is_the_one_trained_on"]
    assert (report.passed, report.severity) == (passed, severity)


def test_a_refusal_writes_nothing(tmp_path: Path) -> None:
    base = tiny_qwen2(tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / "adapter", alora_invocation_tokens=[3])
    with pytest.raises(AdapterRefused, match="alora_invocation_tokens"):
        merge(base=base, fine_tune=adapter, destination=tmp_path / "out" / "merged")
    assert not (tmp_path / "out").exists()


def test_an_adapter_beside_a_whole_model_is_refused(tmp_path: Path) -> None:
    base = tiny_qwen2(tmp_path / "base")
    both = tiny_adapter(base, tiny_qwen2(tmp_path / "both"))
    with pytest.raises(InputRefused, match="an adapter and a whole model"):
        merge(base=base, fine_tune=both, destination=tmp_path / "merged")


def test_a_weight_that_overflows_fails_the_stage_by_name(tmp_path: Path) -> None:
    base = tiny_qwen2(tmp_path / "base", dtype=torch.float16)
    adapter = tiny_adapter(base, tmp_path / "adapter", target_modules=["up_proj"])
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    save_file({name: tensor * 1e4 for name, tensor in tensors.items()}, adapter / ADAPTER_WEIGHTS)
    with pytest.raises(CheckFailed, match=r"layers\.0\.mlp\.up_proj\.weight has values that are not finite"):
        merge(base=base, fine_tune=adapter, destination=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_killed_merge_resumes_to_the_same_content(tmp_path: Path) -> None:
    base = tiny_qwen2(tmp_path / "base", shards=3)
    adapter = tiny_adapter(base, tmp_path / "adapter")
    out = tmp_path / "merged"
    killed = subprocess.run([sys.executable, "-m", KILLED, "merge", str(base), str(adapter), str(out)])
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    (shard,) = (tmp_path / "merged.partial").glob("model-00001*.safetensors")
    finished = shard.stat()

    resumed = merge(base=base, fine_tune=adapter, destination=out)
    undisturbed = merge(base=base, fine_tune=adapter, destination=tmp_path / "undisturbed")
    assert (out / shard.name).stat().st_mtime_ns == finished.st_mtime_ns
    assert resumed.manifest.content_digest == undisturbed.manifest.content_digest
    assert require_intact(out).contents.files == undisturbed.manifest.contents.files
