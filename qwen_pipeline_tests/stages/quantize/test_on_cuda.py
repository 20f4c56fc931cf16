"""Quantization on one GPU and on two."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.store.destinations import Directory
from qwen_pipeline.quantization.recipes import RecipeName
from qwen_pipeline.quantization.spec import QuantizerName
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline.workers.environments import WorkerEnvironment, find_environment
from qwen_pipeline_tests.layouts import Layout
from qwen_pipeline_tests.rounding import save_dequantized
from qwen_pipeline_tests.stages.quantize.quantizing import (
    SPEC,
    Run,
    compare_logits,
    require_faithful,
    require_passed,
)
from qwen_pipeline_tests.tiny import tiny_model


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gptqmodel", "autogptq"])
def test_each_quantizer_runs_on_cuda(run: Run, tmp_path: Path, name: QuantizerName) -> None:
    artifact = quantize(
        source=run.source,
        destination=Directory(tmp_path / "out"),
        calibration=run.calibration,
        spec=replace(SPEC, engine=name, device="cuda"),
        engine=find_environment(name),
    )
    require_passed(artifact)
    assert all(0 < loss["loss"] < 1 for loss in artifact.manifest.result["losses"])
    require_faithful(open_checkpoint(run.source), open_checkpoint(artifact.path))
    loaders = find_environment("gptqmodel")
    assert (
        compare_logits(loaders, "load_with_transformers", run.source, artifact.path, CUDA_VISIBLE_DEVICES="")["kl"]
        < 0.1
    )
    assert compare_logits(loaders, "load_with_gptqmodel", run.source, artifact.path)["kl"] < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["fast", "balanced"])
def test_every_kernel_takes_negative_scales(run: Run, tmp_path: Path, recipe: RecipeName) -> None:
    """The oracle has dequantized weights, in float32; kernels compute in 16 bits."""
    source = tiny_model("qwen2", tmp_path / "source", hidden_size=256, intermediate_size=512)
    spec = replace(SPEC, engine="layerwise", recipe=recipe, group_size=128, device="cuda")
    artifact = quantize(
        source=source, destination=Directory(tmp_path / "out"), calibration=run.calibration, spec=spec,
        engine=find_environment("gptqmodel"),
    )  # fmt: skip
    require_passed(artifact)
    output = open_checkpoint(artifact.path)
    assert any((output.load(name) < 0).any() for name in output if name.endswith(".scales"))
    whole = save_dequantized(source, artifact.path, tmp_path / "dequantized")
    for kernel in ("gptq_torch", "gptq_triton", "gptq_exllama_v2", "gptq_marlin", "gptq_machete"):
        found = compare_logits(
            find_environment("gptqmodel"), "load_with_gptqmodel", whole, artifact.path, KERNEL=kernel
        )
        assert found["kl"] < 1e-4, kernel


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_gptqmodel_distributes_work_over_two_gpus(
    tmp_path: Path, calibration: Path, engine: WorkerEnvironment, family: str
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    sizes: dict[str, Any] = {"intermediate_size": 128} if family == "qwen2" else {"moe_intermediate_size": 64}
    source = tiny_model(family, tmp_path / "source", **sizes)
    artifacts = [
        quantize(
            source=source,
            destination=Directory(tmp_path / name),
            calibration=calibration,
            spec=replace(SPEC, device="cuda", gpus=2, all_experts=family == "qwen3_moe"),
            engine=engine,
        )
        for name in ("once", "again")
    ]
    require_faithful(open_checkpoint(source), open_checkpoint(artifacts[0].path))
    assert len({artifact.manifest.content_digest for artifact in artifacts}) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["saved", "fused"])
@pytest.mark.parametrize("name", ["gptqmodel", "layerwise"])
def test_each_loop_quantizes_experts_on_cuda(run: Run, tmp_path: Path, name: QuantizerName, layout: Layout) -> None:
    artifact = quantize(
        source=tiny_model("qwen3_moe", tmp_path / "source", moe_intermediate_size=64, layout=layout),
        destination=Directory(tmp_path / "out"),
        calibration=run.calibration,
        spec=replace(SPEC, engine=name, device="cuda", all_experts=True),
        engine=find_environment("gptqmodel"),
    )
    output = open_checkpoint(artifact.path)
    require_passed(artifact, skipped=())
    assert sum(".experts." in tensor and tensor.endswith(".qweight") for tensor in output) == 2 * 4 * 3
    require_faithful(open_checkpoint(tmp_path / "source"), output)
