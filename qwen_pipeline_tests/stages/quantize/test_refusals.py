"""Inputs that cannot be quantized: they are refused before anything is written or started."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline.checkpoint.store.destinations import Directory
from qwen_pipeline.errors import InputRefused, QuantizedInputRefused
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline.workers.environments import WorkerEnvironment
from qwen_pipeline_tests.stages.quantize.quantizing import SPEC, Run
from qwen_pipeline_tests.tiny import tiny_model, tiny_qwen2


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_qwen2(tmp_path / "source", intermediate_size=128)


def refused(source: Path, calibration: Path, tmp_path: Path, spec: QuantSpec = SPEC) -> InputRefused:
    nothing = WorkerEnvironment(name="gptqmodel", python=Path("/nowhere/python"))
    with pytest.raises(InputRefused) as caught:
        quantize(
            source=source, destination=Directory(tmp_path / "out"), calibration=calibration, spec=spec,
            engine=nothing,
        )  # fmt: skip
    assert not list(tmp_path.glob("out*"))
    return caught.value


def test_codes_are_refused(run: Run, calibration: Path, tmp_path: Path) -> None:
    fault = refused(run.artifact.path, calibration, tmp_path)
    assert isinstance(fault, QuantizedInputRefused)
    assert "merge, then pad, then quantize" in fault.remedy


def test_codes_without_their_config_are_refused(run: Run, calibration: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run.artifact.path, tmp_path / "copy"))
    shutil.copy(run.source / "config.json", copy / "config.json")
    assert isinstance(refused(copy, calibration, tmp_path), QuantizedInputRefused)


def test_sizes_with_partial_groups_are_refused(calibration: Path, tmp_path: Path) -> None:
    source = tiny_qwen2(tmp_path / "odd", intermediate_size=96)
    fault = refused(source, calibration, tmp_path, replace(SPEC, group_size=64))
    assert "down_proj has in_features 96, which is not a multiple of 64" in fault.what
    assert "Pad the checkpoint first" in fault.remedy


def test_an_override_that_matches_no_module_is_refused(source: Path, calibration: Path, tmp_path: Path) -> None:
    spec = replace(SPEC, dynamic={r"mlp\.dwon_proj": {"damp_percent": 0.1}})
    fault = refused(source, calibration, tmp_path, spec)
    assert "dwon_proj" in fault.what


def test_pad_tokens_for_experts_are_refused(calibration: Path, tmp_path: Path) -> None:
    source = tiny_model("qwen3_moe", tmp_path / "mixture", moe_intermediate_size=64)
    fault = refused(source, calibration, tmp_path, replace(SPEC, packing="documents"))
    assert "pad tokens" in fault.what


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next"])
def test_dense_layers_beside_experts_are_refused(calibration: Path, tmp_path: Path, family: str) -> None:
    sizes: dict[str, Any] = {
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "intermediate_size": 128,
    }
    source = tiny_model(family, tmp_path / "mixture", mlp_only_layers=[1], **sizes)
    fault = refused(source, calibration, tmp_path)
    assert "Layer 1 of this mixture of experts is dense" in fault.what
    assert "layerwise" in fault.remedy


def test_windows_longer_than_the_model_are_refused(source: Path, calibration: Path, tmp_path: Path) -> None:
    fault = refused(source, calibration, tmp_path, replace(SPEC, samples=1, seq_len=513))
    assert "512 positions" in fault.what


def test_too_little_text_is_refused(source: Path, calibration: Path, tmp_path: Path) -> None:
    fault = refused(source, calibration, tmp_path, replace(SPEC, samples=1000))
    assert "1000 windows of 64 need 64,000" in fault.what
