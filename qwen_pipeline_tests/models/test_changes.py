"""A fine-tune that leaves the base as it is fails a check, as early as that is known; a change is measured."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_pipeline.checkpoint.store.destinations import Artifact
from qwen_pipeline.cli.inspect import inspect
from qwen_pipeline.errors import CheckFailed
from qwen_pipeline.models.changes import CHANGES_BASE
from qwen_pipeline.reports import CheckReport, load_reports
from qwen_pipeline.stages.merge import merge
from qwen_pipeline.stages.merge_pad import merge_pad
from qwen_pipeline.transforms.lora.adapter import ADAPTER_CONFIG
from qwen_pipeline.transforms.lora.adapter_set import weighted
from qwen_pipeline.transforms.lora.saved.weights import ADAPTER_WEIGHTS
from qwen_pipeline_tests.adapter_kinds import KINDS, train
from qwen_pipeline_tests.tiny import tiny_adapter, tiny_qwen2, tiny_qwen3

pytestmark = pytest.mark.lengthy


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_qwen3(tmp_path / "base", shards=3)


def change_of(artifact: Artifact) -> CheckReport:
    return next(report for report in load_reports(artifact.manifest.result) if report.name == CHANGES_BASE.name)


def edit(adapter: Path, **fields: Any) -> None:
    file = adapter / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def scaled(adapter: Path, part: str, factor: float) -> Path:
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    file = adapter / ADAPTER_WEIGHTS
    save_file({name: t * factor if part in name else t for name, t in tensors.items()}, file)
    return adapter


def weights(root: Path) -> dict[str, torch.Tensor]:
    return {name: t.double() for file in root.glob("*.safetensors") for name, t in load_file(file).items()}


def relative_change(base: Path, merged: Path) -> tuple[int, float]:
    """Return the number of changed tensors, and the relative norm of the change, in float64."""
    before, after = weights(base), weights(merged)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    norms = [sum(float(t.square().sum()) for t in tensors) for tensors in (
        [after[name] - before[name] for name in changed], [before[name] for name in changed]
    )]  # fmt: skip
    return len(changed), (norms[0] / norms[1]) ** 0.5


def test_a_scaling_of_zero_fails_before_anything_is_written(base: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(base, tmp_path / "adapter")
    edit(adapter, lora_alpha=0)
    with pytest.raises(CheckFailed, match=r"changes_the_base.*scaling of every update is 0 \(lora_alpha 0, weight 1\)"):
        merge(base=base, fine_tune=adapter, destination=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert isinstance(inspect(adapter, base=base).fault, CheckFailed)
    edit(adapter, alpha_pattern={"q_proj": 4})
    merged = merge(base=base, fine_tune=adapter, destination=tmp_path / "merged")
    assert relative_change(base, merged.path)[0] == 2
    assert str(change_of(merged).measured).startswith("2 of ")


def test_weights_of_zero_fail(base: Path, tmp_path: Path) -> None:
    adapters = weighted([tiny_adapter(base, tmp_path / name) for name in "ab"], [0.0, 0.0], combination="cat")
    with pytest.raises(CheckFailed, match="weight 0"):
        merge(base=base, fine_tune=adapters, destination=tmp_path / "merged")


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_factors_of_zeros_fail_before_anything_is_written(base: Path, tmp_path: Path, part: str) -> None:
    adapter = scaled(tiny_adapter(base, tmp_path / "adapter"), part, 0.0)
    with pytest.raises(CheckFailed, match="all 14 updates have a factor of zeros"):
        merge(base=base, fine_tune=adapter, destination=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", ["lora_bias", "modules_to_save", "tokens", "dora"])
def test_other_parts_of_an_adapter_count(tmp_path: Path, kind: str) -> None:
    base = tiny_qwen2(tmp_path / "base")
    train(KINDS[kind], base, tmp_path / "adapter")
    adapter = scaled(tmp_path / "adapter", "lora_B.weight", 0.0)
    merged = merge(base=base, fine_tune=adapter, destination=tmp_path / "merged")
    changed, _ = relative_change(base, merged.path)
    assert change_of(merged).passed
    assert str(change_of(merged).measured).startswith(f"{changed} of ")


def test_updates_that_rounding_loses_fail_the_check(base: Path, tmp_path: Path) -> None:
    adapter = scaled(tiny_adapter(base, tmp_path / "adapter"), "lora_B", 1e-9)
    report = change_of(merge(base=base, fine_tune=adapter, destination=tmp_path / "merged"))
    assert report.blocks
    assert "lost when the weights are rounded" in report.detail


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"target_modules": ["embed_tokens", "q_proj"]}], ids=str)
def test_the_change_is_measured_as_in_float64(base: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    adapter = tiny_adapter(base, tmp_path / "adapter", **lora)
    merged = merge(base=base, fine_tune=adapter, destination=tmp_path / "merged")
    changed, relative = relative_change(base, merged.path)
    assert change_of(merged).measured == f"{changed} of {len(weights(base))} tensors, by {relative:.2%} of their norm"


def test_one_pass_and_a_resumed_merge_report_the_same_change(base: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(base, tmp_path / "adapter")
    expected = change_of(merge(base=base, fine_tune=adapter, destination=tmp_path / "merged"))
    recipe, _ = merge_pad(base=base, fine_tune=adapter, merged=tmp_path / "recipe", padded=tmp_path / "padded")
    assert change_of(recipe) == expected
    killed = "qwen_pipeline_tests.stages.killed_stage"
    command = [sys.executable, "-m", killed, "merge", str(base), str(adapter), str(tmp_path / "resumed")]
    assert subprocess.run(command, env=dict(os.environ)).returncode == -signal.SIGKILL
    assert change_of(merge(base=base, fine_tune=adapter, destination=tmp_path / "resumed")) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_that_equals_its_base_fails_before_anything_is_written(
    base: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    tuned = shutil.copytree(base, tmp_path / "tuned")
    for file in tuned.glob("*.safetensors"):
        save_file({name: t.to(dtype) for name, t in load_file(file).items()}, file)
    with pytest.raises(
        CheckFailed, match=r"changes_the_base.*every tensor of the fine-tune has the values of the base"
    ):
        merge(base=base, fine_tune=tuned, destination=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("where", ["first", "last"])
def test_one_changed_value_makes_a_model_a_fine_tune(base: Path, tmp_path: Path, where: str) -> None:
    tuned = shutil.copytree(base, tmp_path / "tuned")
    file = next(file for file in tuned.glob("*.safetensors") if "model.embed_tokens.weight" in load_file(file))
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"].view(-1)[0 if where == "first" else -1] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    report = change_of(merge(base=base, fine_tune=tuned, destination=tmp_path / "merged"))
    assert report.passed
    assert report.measured == f"1 of {len(weights(base))} tensors"


def test_a_config_that_computes_something_else_is_a_change_with_a_warning(base: Path, tmp_path: Path) -> None:
    tuned = shutil.copytree(base, tmp_path / "tuned")
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | {"transformers_version": "4.57.1", "use_cache": False}))
    with pytest.raises(CheckFailed, match="changes_the_base"):
        merge(base=base, fine_tune=tuned, destination=tmp_path / "merged")
    (tuned / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    report = change_of(merge(base=base, fine_tune=tuned, destination=tmp_path / "merged"))
    assert (report.outcome, report.measured) == ("warning", f"0 of {len(weights(base))} tensors")
