"""Fine-tunes with other heads through every stage: merged, padded, quantized, validated, published."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.evaluation.limits import Limits
from qwen_pipeline.evaluation.report.load import load_validation
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.stages.merge import merge
from qwen_pipeline.stages.pad import pad
from qwen_pipeline.stages.publish import publish
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline.stages.validate import ValidationInputs, ValidationPlan, validate
from qwen_pipeline.workers.environments import find_environment
from qwen_pipeline_tests.chain import write_text
from qwen_pipeline_tests.tiny import tiny_qwen3
from qwen_pipeline_tests.tiny_heads import Head, as_sentence_transformer, tiny_headed

RANDOM = Limits(max_head_error=2, min_label_agreement=0.3, min_reward_order=0.5, min_embedding_cosine=0.5)
"""Limits for weights that are random: they have no redundancy that 4 bits could use."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "labels", "ran"),
    [
        ("ForSequenceClassification", 3, {"head_logits", "label_agreement"}),
        ("ForSequenceClassification", 1, {"head_logits", "reward_order"}),
        ("ForTokenClassification", 3, {"head_logits", "label_agreement"}),
        ("Model", 0, {"embedding_cosine"}),
    ],
)
def test_a_fine_tune_is_published(tmp_path: Path, head: Head, labels: int, ran: set[str]) -> None:
    engine = find_environment("gptqmodel")
    base = tiny_qwen3(tmp_path / "base", tie=True)
    trained = tiny_headed(base, tmp_path / "trained", head, labels=labels)
    if head == "Model":
        as_sentence_transformer(trained)
    merged = merge(base=base, fine_tune=trained, destination=tmp_path / "merged").path
    padded = pad(
        source=merged, destination=tmp_path / "padded", spec=PaddingSpec(group_size=32, tensor_parallel=2)
    ).path
    spec = QuantSpec(group_size=32, samples=16, seq_len=64, batch_size=8, threads=2, device="cpu")
    calibration = write_text(tmp_path / "calibration.jsonl", documents=24, stride=7)
    quantized = quantize(
        source=padded, destination=tmp_path / "quantized", calibration=str(calibration), spec=spec, engine=engine
    ).path
    text = write_text(tmp_path / "held_out.jsonl", documents=24, stride=5)
    inputs = ValidationInputs(reference=merged, candidate=quantized, padded=padded, base=base, text=text)
    plan = ValidationPlan(tensor_parallel=2, windows=16, seq_len=64, limits=RANDOM)
    validated = validate(inputs, plan=plan, destination=tmp_path / "validated", engine=engine)

    report = load_validation(validated.path, validated.manifest)
    outcomes: dict[str, Any] = {check.name: check for check in report.checks}
    assert {name for name in ("head_logits", "label_agreement", "reward_order", "embedding_cosine")
            if outcomes[name].passed} == ran  # fmt: skip
    assert outcomes["kl_divergence"].skipped
    assert outcomes["loads_in_transformers"].passed
    assert outcomes["structure"].passed, outcomes["structure"].detail
    assert outcomes["padding_is_silent"].measured < 1e-5
    config = json.loads((quantized / "config.json").read_text())
    if head != "Model":
        assert "-:.*score.*" in config["quantization_config"]["dynamic"]
        assert open_checkpoint(quantized)["score.weight"].rows == labels
    release = publish(
        quantized=quantized,
        validated=validated.path,
        destination=tmp_path / "release",
        base_model="base",
        fine_tune="it",
    ).path
    card = (release / "README.md").read_text()
    assert f"AutoModel{head.removeprefix('Model')}.from_pretrained" in card
    assert (release / "modules.json").is_file() == (head == "Model")
