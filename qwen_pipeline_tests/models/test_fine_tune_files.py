"""Weights beside a fine-tune's own are refused by name, with remedies that work; files of trainers are left behind."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_pipeline.checkpoint.digest_cache import checkpoint_digest
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.models.fine_tune_files import FILES_READ
from qwen_pipeline.models.open import fine_tune_digest
from qwen_pipeline.reports import CheckReport, load_reports
from qwen_pipeline.stages.convert import convert
from qwen_pipeline.stages.merge import merge
from qwen_pipeline_tests.tiny import tiny_adapter, tiny_model, tiny_qwen2

pytestmark = pytest.mark.lengthy

LEFT_BEHIND = {
    "README.md": "a document",
    "optimizer.pt": "state for resuming the training",
    "scheduler.pt": "state for resuming the training",
    "rng_state_0.pth": "state for resuming the training",
    "training_args.bin": "state for resuming the training",
    "trainer_state.json": "state for resuming the training",
    "global_step12/mp_rank_00_model_states.pt": "state for resuming the training",
    "checkpoint-4/adapter_model.safetensors": "an earlier checkpoint",
    "runs/Nov30/events.out.tfevents.1": "logs of the training",
    "trainer_log.jsonl": "logs of the training",
    "training_loss.png": "logs of the training",
    "all_results.json": "a document",
    "additional_config.json": "a document",
    "zero_to_fp32.py": "code, which is never run",
    "notes": "not weights",
}
UNREAD = (
    "vit.safetensors", "non_lora_state_dict.bin", "adapter_model.bin", "value_head.pt", "reference/adapter_model.pth",
    "2_Dense/model.safetensors", "adapter_model-2.safetensors", "extra.ckpt", "weights.pkl", "model.gguf",
)  # fmt: skip


def written(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("content")
    return root


def files_read(base: Path, fine_tune: Path, out: Path, *leave_behind: str) -> CheckReport:
    merged = merge(base=base, fine_tune=fine_tune, destination=out, leave_behind=leave_behind)
    return next(report for report in load_reports(merged.manifest.result) if report.name == FILES_READ.name)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_qwen2(tmp_path / "base")


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_files_of_trainers_are_left_behind_and_listed(base: Path, tmp_path: Path, kind: str) -> None:
    root = tiny_adapter(base, tmp_path / "a") if kind == "adapter" else tiny_qwen2(tmp_path / "a", seed=3)
    report = files_read(base, written(root, *LEFT_BEHIND), tmp_path / "merged")
    assert report.passed
    for reason in set(LEFT_BEHIND.values()):
        assert f"{reason}: {min(name for name, why in LEFT_BEHIND.items() if why == reason)}" in report.detail


@pytest.mark.parametrize("name", UNREAD)
def test_weights_that_a_merge_does_not_read_are_refused_unless_left_behind(
    base: Path, tmp_path: Path, name: str
) -> None:
    adapter = written(tiny_adapter(base, tmp_path / "adapter"), name)
    with pytest.raises(InputRefused, match=f"does not read: {name}") as refusal:
        merge(base=base, fine_tune=adapter, destination=tmp_path / "merged")
    assert f"--leave-behind {name}" in refusal.value.remedy
    assert not (tmp_path / "merged").exists()
    report = files_read(base, adapter, tmp_path / "merged", name.replace(".", ".*", 1))
    assert report.passed
    assert report.measured == "1 left behind on request"
    assert name in report.detail


def test_weights_beside_a_whole_model_are_refused_but_not_its_other_formats(base: Path, tmp_path: Path) -> None:
    tuned = written(tiny_qwen2(tmp_path / "tuned", seed=3), "pytorch_model.bin", "onnx/model.onnx", "model-q4.gguf")
    assert "the same weights in another format" in files_read(base, tuned, tmp_path / "merged").detail
    written(tuned, "value_head.safetensors")
    with pytest.raises(InputRefused, match=r"value_head\.safetensors"):
        merge(base=base, fine_tune=tuned, destination=tmp_path / "again")


def test_the_settings_of_an_adapter_beside_the_model_it_was_merged_into_are_left_behind(
    base: Path, tmp_path: Path
) -> None:
    adapter, tuned = tiny_adapter(base, tmp_path / "adapter"), tiny_qwen2(tmp_path / "tuned", seed=3)
    shutil.copy(adapter / "adapter_config.json", tuned)
    assert "adapter_config.json" in files_read(base, tuned, tmp_path / "merged").detail
    assert checkpoint_digest(tmp_path / "merged") == checkpoint_digest(tuned) == fine_tune_digest(tuned)
    shutil.copy(adapter / "adapter_model.safetensors", tuned)
    with pytest.raises(InputRefused, match="holds an adapter and a whole model"):
        merge(base=base, fine_tune=tuned, destination=tmp_path / "again")
    (tuned / "adapter_model.safetensors").rename(tuned / "adapter_model.bin")
    with pytest.raises(InputRefused, match=r"does not read: adapter_model\.bin"):
        merge(base=base, fine_tune=tuned, destination=tmp_path / "again")


def test_weights_beside_a_set_of_adapters_are_refused(base: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    tiny_adapter(base, root / "style")
    (root / "adapters.toml").write_text('[[adapters]]\npath = "style"\n')
    assert files_read(base, root, tmp_path / "merged").passed
    written(root, "head.safetensors")
    with pytest.raises(InputRefused, match=r"head\.safetensors"):
        merge(base=base, fine_tune=root, destination=tmp_path / "again")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit.safetensors", "vit.bin", "non_lora_state_dict.bin"])
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_the_remedy_adds_trained_weights_to_the_adapter(tmp_path: Path, name: str, prefix: str) -> None:
    base = tiny_model("qwen2_5_vl", tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / "adapter", target_modules=r".*layers\.\d+\.self_attn\.[qv]_proj")
    alone = load_file(merge(base=base, fine_tune=adapter, destination=tmp_path / "alone").path / "model.safetensors")
    tower = {key: t + 0.5 for key, t in load_file(base / "model.safetensors").items() if key.startswith("visual.")}
    named = {prefix + key: t for key, t in tower.items()}
    if name.endswith("safetensors"):
        save_file(named, adapter / name)
    else:
        torch.save(named, adapter / name)
    with pytest.raises(InputRefused) as refusal:
        merge(base=base, fine_tune=adapter, destination=tmp_path / "merged")
    if "python -c" in refusal.value.remedy:
        command = refusal.value.remedy.split("modules_to_save: ")[1].splitlines()[0]
        subprocess.run(command.replace("python -c", f"{shlex.quote(sys.executable)} -c"), shell=True, check=True)
    else:
        assert f"qwen-pipeline convert --from {adapter} --out CONVERTED" in refusal.value.remedy
        adapter = convert(source=adapter, destination=tmp_path / "converted").path
    merged = merge(base=base, fine_tune=adapter, destination=tmp_path / "merged")
    found = load_file(merged.path / "model.safetensors")
    assert found.keys() == alone.keys()
    assert all(torch.equal(found[key], tower.get(key, alone[key])) for key in found)


def test_code_of_a_models_own_is_refused(base: Path, tmp_path: Path) -> None:
    tuned = tiny_qwen2(tmp_path / "tuned", seed=3)
    config = (tuned / "config.json").read_text()
    (tuned / "config.json").write_text(
        config.replace("{", '{"auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"},', 1)
    )
    with pytest.raises(InputRefused, match=r"AutoModel: modeling_qwen\.Qwen2Model"):
        merge(base=base, fine_tune=tuned, destination=tmp_path / "merged")
    (tuned / "config.json").write_text(config)
    assert merge(base=base, fine_tune=tuned, destination=tmp_path / "merged")


def test_a_name_that_a_shell_would_run_is_in_no_command(base: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(base, tmp_path / "adapter")
    (adapter / "$(touch harm)'.bin").write_text("content")
    with pytest.raises(InputRefused) as refusal:
        merge(base=base, fine_tune=adapter, destination=tmp_path / "merged")
    assert "python -c" not in refusal.value.remedy
    assert """--leave-behind '$(touch harm)'"'"'.bin'""" in refusal.value.remedy
