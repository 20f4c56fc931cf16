"""Settings of a quantization, in the codes and in the log."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.store.destinations import Directory
from qwen_pipeline.quantization.spec import QuantizerName
from qwen_pipeline.qwen.linears import decoder_linears
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline.transforms.codes.gptq import gptq_format
from qwen_pipeline.workers.environments import WorkerEnvironment
from qwen_pipeline_tests.stages.quantize.quantizing import SPEC, Run, require_passed
from qwen_pipeline_tests.tiny import tiny_model, tiny_qwen3

SETTINGS = {
    "asymmetric": {"sym": False},
    "act-order": {"desc_act": True},
    "asymmetric act-order": {"sym": False, "desc_act": True, "group_size": 64},
    "no group order": {"act_group_aware": False},
    "8 bits": {"bits": 8, "group_size": 64},
    "documents": {"packing": "documents"},
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_take_effect(tmp_path: Path, calibration: Path, engine: WorkerEnvironment, setting: str) -> None:
    source = tiny_qwen3(tmp_path / "source", intermediate_size=128, hidden_size=128)
    spec = replace(SPEC, **SETTINGS[setting])
    artifact = quantize(
        source=source, destination=Directory(tmp_path / "out"), calibration=calibration, spec=spec, engine=engine
    )
    output = open_checkpoint(artifact.path)
    require_passed(artifact)
    assert "lm_head.weight" in output
    stated = output.config["quantization_config"]
    assert {name: stated[name] for name in ("bits", "group_size", "sym", "desc_act")} == {
        name: getattr(spec, name) for name in ("bits", "group_size", "sym", "desc_act")
    }
    form = gptq_format(output.config)
    for linear in decoder_linears(open_checkpoint(source)):
        packed = form.load(output, linear.module)
        weight_OI = open_checkpoint(source).load(f"{linear.module}.weight").double()
        error = (packed.weight_rows(0, linear.out_features).double() - weight_OI).norm() / weight_OI.norm()
        assert error < (0.01 if spec.bits == 8 else 0.15), f"{linear.module}: {error}"
        assert packed.is_in_order or spec.desc_act


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptqmodel", "layerwise"])
def test_overrides_apply_to_single_modules(
    run: Run, tmp_path: Path, engine: WorkerEnvironment, name: QuantizerName
) -> None:
    """One of the modules shares its inputs, and so its Hessian, with others."""
    damping = {"model.layers.1.mlp.down_proj": 0.3, "model.layers.0.self_attn.k_proj": 0.2}
    dynamic = {re.escape(module): {"damp_percent": damp} for module, damp in damping.items()}
    artifact = quantize(
        source=run.source, destination=Directory(tmp_path / "out"), calibration=run.calibration,
        spec=replace(SPEC, engine=name, dynamic=dynamic), engine=engine,
    )  # fmt: skip
    damp = {loss["module"]: loss["damp"] for loss in artifact.manifest.result["losses"]}
    assert {module: share for module, share in damp.items() if share != 0.05} == pytest.approx(damping)
    require_passed(artifact)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptqmodel", "layerwise"])
def test_all_experts_are_calibrated_with_every_token(
    tmp_path: Path, calibration: Path, engine: WorkerEnvironment, name: QuantizerName
) -> None:
    source = tiny_model("qwen3_moe", tmp_path / "source", moe_intermediate_size=64, hidden_size=64)
    artifact = quantize(
        source=source, destination=Directory(tmp_path / "out"), calibration=calibration,
        spec=replace(SPEC, engine=name, all_experts=True), engine=engine,
    )  # fmt: skip
    losses = artifact.manifest.result["losses"]
    assert {loss["samples"] for loss in losses if ".experts." in loss["module"]} == {8 * 64}
    require_passed(artifact, skipped=())
