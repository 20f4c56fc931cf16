"""Output of a quantization by GPTQModel: tensors, logs, manifest and checks."""

from pathlib import Path

import pytest
import torch

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.store.destinations import Directory
from qwen_pipeline.checkpoint.store.verify import require_intact
from qwen_pipeline.errors import CheckFailed
from qwen_pipeline.quantization.checks import CHECKS
from qwen_pipeline.qwen.linears import decoder_linears
from qwen_pipeline.reports import load_reports
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline.workers.environments import WorkerEnvironment
from qwen_pipeline_tests.stages.quantize.quantizing import (
    SPEC,
    Run,
    compare_logits,
    require_faithful,
    require_passed,
    with_nan,
)
from qwen_pipeline_tests.tiny import DENSE_LINEARS, tiny_qwen2


def test_seconds_are_split_between_quantizer_and_stage(run: Run) -> None:
    manifest = run.artifact.manifest
    engine, stage = (manifest.result["seconds"][whose] for whose in ("engine", "stage"))
    assert engine.keys() == {"import", "load", "quantize", "save"}
    assert min(*engine.values(), *stage.values()) >= 0
    assert sum(engine.values()) < manifest.run.seconds < sum(engine.values()) + sum(stage.values()) + 0.5


def test_every_check_is_reported_and_none_fails(run: Run) -> None:
    reports = load_reports(run.artifact.manifest.result)
    assert [report.name for report in reports] == [check.name for check in CHECKS]
    require_passed(run.artifact)


def test_manifest_and_progress_have_the_loss_of_each_module(run: Run) -> None:
    losses = run.artifact.manifest.result["losses"]
    assert [loss["module"] for loss in losses] == [
        f"model.layers.{layer}.{kind}" for layer in range(2) for kind in DENSE_LINEARS
    ]
    assert all(0 < loss["loss"] < 1 and loss["samples"] == 8 * 64 for loss in losses)
    events = [event for event in run.progress if event.task == "quantize"]
    assert {(event.done, event.total, event.unit) for event in events} == {(0, 2, "layers"), (1, 2, "layers")}
    assert {event.remark.split(" loss ")[0] for event in events} == {
        loss["module"].removeprefix("model.") for loss in losses
    }


def test_the_derivation_holds_tokens_spec_and_versions(run: Run) -> None:
    manifest = run.artifact.manifest
    assert manifest.derivation.inputs.keys() == {"source", "calibration"}
    assert manifest.derivation.inputs["calibration"] == manifest.result["calibration"]["digest"]
    assert SPEC.to_json().items() <= manifest.derivation.spec.items()
    assert manifest.derivation.spec["versions"].keys() == {"gptqmodel", "torch"}
    assert manifest.run.peak_memory_bytes > 300 * 2**20, "the worker's memory counts"


def test_tensors_that_are_not_quantized_equal_the_source(run: Run) -> None:
    source, output = open_checkpoint(run.source), run.output
    weights = {f"{linear.module}.weight" for linear in decoder_linears(source)}
    kept = [name for name in source if name not in weights]
    assert any(name.endswith(".bias") for name in kept)
    for name in kept:
        assert output[name] == source[name]
        assert torch.equal(output.load(name), source.load(name))
        assert output.shards[name] == source.shards[name]
    assert {name: value for name, value in output.config.items() if name != "quantization_config"} == source.config
    for relative, file in source.sidecars.items():
        assert (run.artifact.path / relative).read_bytes() == file.read_bytes()
    assert not weights & output.keys()


def test_the_directory_holds_no_other_files(run: Run) -> None:
    require_intact(run.artifact.path)
    assert sorted(path.name for path in (run.artifact.path / "logs").iterdir()) == [
        "evidence.csv", "evidence.png", "quant_log.csv", "quantize.log",
    ]  # fmt: skip
    assert not any(path.name.startswith(".") for path in run.artifact.path.iterdir())


def test_dequantized_codes_are_close_to_the_weights(run: Run) -> None:
    require_faithful(open_checkpoint(run.source), run.output)


def test_transformers_loads_the_output_and_predicts_nearly_the_same(run: Run, engine: WorkerEnvironment) -> None:
    found = compare_logits(engine, "load_with_transformers", run.source, run.artifact.path)
    assert found["missing"] == found["unexpected"] == found["mismatched"] == []
    assert found["kl"] < 0.1


@pytest.mark.slow
def test_a_hessian_that_is_not_positive_definite_fails_the_checks(
    tmp_path: Path, calibration: Path, engine: WorkerEnvironment
) -> None:
    source = with_nan(tiny_qwen2(tmp_path / "source", intermediate_size=128), "model.layers.1.input_layernorm.weight")

    artifact = quantize(
        source=source, destination=Directory(tmp_path / "out"), calibration=calibration, spec=SPEC, engine=engine
    )

    failed = {report.name: report for report in load_reports(artifact.manifest.result) if report.blocks}
    assert failed.keys() == {"no_rounding_fallback", "losses_finite"}
    assert failed["no_rounding_fallback"].measured == len(DENSE_LINEARS)
    assert "model.layers.1.self_attn.q_proj" in failed["no_rounding_fallback"].detail


@pytest.mark.slow
def test_a_nan_loss_stops_the_run(tmp_path: Path, calibration: Path, engine: WorkerEnvironment) -> None:
    source = with_nan(tiny_qwen2(tmp_path / "source", intermediate_size=128), "model.layers.1.mlp.down_proj.weight")
    with pytest.raises(CheckFailed, match=r"mlp\.down_proj"):
        quantize(
            source=source, destination=Directory(tmp_path / "out"), calibration=calibration, spec=SPEC, engine=engine
        )
    assert not (tmp_path / "out").exists()
