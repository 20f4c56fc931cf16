"""The quantizer ``layerwise`` against GPTQModel's own loop, and its resuming after an interruption."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.store.destinations import Directory
from qwen_pipeline.progress import Progress
from qwen_pipeline.quantization.calibration.calibration_set import CalibrationSet, draw_calibration
from qwen_pipeline.quantization.calibration.spec import CalibrationSpec
from qwen_pipeline.quantization.job import QuantJob
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline.workers.parent import run_worker
from qwen_pipeline_tests.chain import GROUP_SIZE, Chain, write_text
from qwen_pipeline_tests.stages.quantize.quantizing import require_passed

DRAWN = CalibrationSpec(samples=16, seq_len=64, seed=1)
SPEC = QuantSpec(
    engine="layerwise", group_size=GROUP_SIZE, samples=16, seq_len=64, batch_size=8, threads=1, device="cpu"
)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "calibration.jsonl", documents=24, stride=7)


def test_codes_equal_gptqmodels_where_the_inputs_do(chain: Chain, calibration: Path, tmp_path: Path) -> None:
    """No quantized layer precedes q, k and v of the first layer, so their inputs, and their codes, are equal.

    Later inputs differ slightly: those of ``layerwise`` are computed with the stored weights, with float16 scales.
    """
    artifact = quantize(
        source=chain.padded, destination=Directory(tmp_path / "out"), calibration=calibration,
        spec=replace(SPEC, engine="layerwise"), engine=chain.engine,
    )  # fmt: skip
    assert artifact.manifest.derivation.spec["engine"] == "layerwise"
    require_passed(artifact)
    ours, theirs = open_checkpoint(artifact.path), open_checkpoint(chain.quantized)
    assert dict(ours) == dict(theirs)
    for name in ours:
        if "layers.0.self_attn.o_proj" in name:
            break
        if "layers.0.self_attn" in name:
            assert torch.equal(ours.load(name), theirs.load(name)), name
    losses = zip(artifact.manifest.result["losses"], json_result(chain.quantized)["losses"], strict=True)
    for our, their in losses:
        assert our["loss"] == pytest.approx(their["loss"], rel=0.05)
        assert our["samples"] == their["samples"] == 16 * 64
        assert our["seconds"] > 0
        assert our["host_peak_bytes"] > 2**28
        assert our["gpu_peak_bytes"] == 0
        assert our["zero_groups"] is not None
        assert their["zero_groups"] is None
    assert not list(artifact.path.rglob("layer-*"))


@pytest.mark.slow
def test_all_codes_equal_gptqmodels_without_the_rounding_of_scales(
    chain: Chain, calibration: Path, tmp_path: Path
) -> None:
    """If inputs are computed with scales before their rounding to float16, all codes of all layers are equal."""
    drawn = replace(DRAWN, seed=SPEC.seed)
    job = save_job(SPEC, chain, draw_calibration(calibration, chain.padded, drawn), tmp_path)
    target = "qwen_pipeline_tests.quantization.targets:quantize_with_unrounded_scales"
    run_worker(chain.engine.python, target, job.to_json(), log=tmp_path / "log")
    ours, theirs = open_checkpoint(job.packed), open_checkpoint(chain.quantized)
    assert len(ours) == 2 * 7 * 4
    for name in ours:
        assert torch.equal(ours.load(name), theirs.load(name)), name


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"bits": 8, "group_size": 64, "sym": False, "desc_act": True}, marks=pytest.mark.slow),
        pytest.param({"recipe": "fast"}, marks=pytest.mark.slow),
        pytest.param({"recipe": "balanced"}, marks=pytest.mark.slow),
        pytest.param({"recipe": "balanced", "modules": {r"layers\.0\.": "keep"}}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_interrupted_run_resumes_at_the_damaged_layer(
    chain: Chain, calibration: Path, tmp_path: Path, changes: Mapping[str, Any]
) -> None:
    spec = replace(SPEC, **changes)
    job = save_job(spec, chain, draw_calibration(calibration, chain.padded, DRAWN), tmp_path)
    assert solved_layers(job, chain, tmp_path) == ({1} if "modules" in changes else {0, 1})
    whole = {file.name: file.read_bytes() for file in job.packed.glob("*.safetensors*")}

    (job.packed / "layer-00001.safetensors").write_bytes(b"torn")
    assert solved_layers(job, chain, tmp_path) == {1}
    assert {file.name: file.read_bytes() for file in job.packed.glob("*.safetensors*")} == whole


@pytest.mark.slow
def test_equal_runs_write_equal_bytes(chain: Chain, calibration: Path, tmp_path: Path) -> None:
    first, second = (
        quantize(
            source=chain.padded, destination=Directory(tmp_path / name), calibration=calibration, spec=SPEC,
            engine=chain.engine,
        ).manifest
        for name in ("first", "second")
    )  # fmt: skip
    assert first.contents.tensors == second.contents.tensors
    assert [set(layer["seconds"]) for layer in first.result["layers"]] == [{"load", "capture", "solve", "forward"}] * 2


def save_job(spec: QuantSpec, chain: Chain, drawn: CalibrationSet, root: Path) -> QuantJob:
    job = QuantJob(spec=spec, source=chain.padded, windows=root / "windows.npy", work_dir=root / "work")
    job.work_dir.mkdir()
    np.save(job.windows, drawn.input_ids.numpy())
    np.save(job.mask, drawn.attention_mask.numpy())
    return job


def solved_layers(job: QuantJob, chain: Chain, logs: Path) -> set[int]:
    seen: list[Progress] = []
    target = "qwen_pipeline.quantization.layerwise:quantize_directory"
    run_worker(chain.engine.python, target, job.to_json(), log=logs / "log", observe=seen.append)
    return {event.done for event in seen}


def json_result(root: Path) -> dict[str, list[dict[str, float]]]:
    return json.loads((root / "manifest.json").read_text())["result"]
