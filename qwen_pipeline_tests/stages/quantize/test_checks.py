"""Checks of a quantizer's output, on checkpoints that no quantizer should write."""

from dataclasses import replace

import pytest

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.quantization.checks import CHECKS, check_output
from qwen_pipeline.quantization.evidence import ModuleEvidence, load_evidence
from qwen_pipeline.qwen.linears import decoder_linears
from qwen_pipeline_tests.stages.quantize.quantizing import SPEC, Run


def failures(output: Checkpoint, run: Run) -> dict[str, str]:
    losses = load_evidence(run.artifact.path)
    reports = check_output(output, decoder_linears(open_checkpoint(run.source)), losses, SPEC)
    assert [report.name for report in reports] == [check.name for check in CHECKS]
    return {report.name: report.detail for report in reports if report.outcome not in ("passed", "skipped")}


def test_a_module_without_codes_is_reported(run: Run) -> None:
    output = run.output
    tensors = {name: tensor for name, tensor in output.tensors.items() if "layers.1.mlp.down_proj" not in name}
    failed = failures(replace(output, tensors=tensors), run)
    assert failed.keys() == {"every_module_quantized"}
    assert "1 of 14 modules: model.layers.1.mlp.down_proj" in failed["every_module_quantized"]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0.0])
def test_an_invalid_scale_is_reported(run: Run, value: float) -> None:
    name = "model.layers.0.mlp.up_proj.scales"
    scales = run.output.load(name)
    scales[1, 2] = value
    wrong = replace(run.output.tensors[name], read=lambda start, stop: scales[start:stop])
    assert failures(run.output.replace(tensors={name: wrong}), run).keys() == {"scales_finite"}


def test_more_damping_than_the_specs_only_warns(run: Run) -> None:
    losses = [replace(row, damp=0.06) for row in load_evidence(run.artifact.path)]
    *_, damping, _ = check_output(run.output, decoder_linears(open_checkpoint(run.source)), losses, SPEC)
    assert not damping.passed
    assert not damping.blocks


@pytest.mark.parametrize(("tokens", "passes"), [(127, False), (128, True)])
def test_an_expert_with_few_tokens_is_reported(run: Run, tokens: int, passes: bool) -> None:
    starved = "model.layers.0.mlp.experts.3.up_proj"
    kind = starved.removeprefix("model.layers.0.")
    row = ModuleEvidence(module=starved, layer=0, kind=kind, loss=0.1, tokens=tokens, damp=0.05, rounded=False)
    *_, fed = check_output(run.output, (), [row], SPEC)
    assert fed.passed == passes
    assert not fed.blocks
    assert (starved in fed.detail) == (not passes)


def test_without_experts_their_check_is_skipped(run: Run) -> None:
    *_, fed = check_output(run.output, (), load_evidence(run.artifact.path), SPEC)
    assert fed.skipped
    assert fed.detail == "The model has no experts."
