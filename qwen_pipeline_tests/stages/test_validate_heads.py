"""Fine-tunes with other heads through every stage: merged, padded, quantized, validated, published."""

import json
from pathlib import Path

import pytest

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.evaluation.limits import Limits
from qwen_pipeline.stages.merge import merge
from qwen_pipeline.stages.publish import publish
from qwen_pipeline_tests.chain import checks_of, continue_chain, validate_chain, write_text
from qwen_pipeline_tests.tiny import tiny_model
from qwen_pipeline_tests.tiny_heads import Head, as_sentence_transformer, tiny_headed

RANDOM = Limits(max_head_error=2, min_label_agreement=0.3, min_reward_order=0.5, min_embedding_cosine=0.5)
"""Limits for weights that are random: they have no redundancy that 4 bits could use."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "head", "labels", "ran"),
    [
        ("qwen3", "ForSequenceClassification", 3, {"head_logits", "label_agreement"}),
        ("qwen3_5", "ForSequenceClassification", 1, {"head_logits", "reward_order"}),
        ("qwen3_next", "ForTokenClassification", 3, {"head_logits", "label_agreement"}),
        ("qwen3", "Model", 0, {"embedding_cosine"}),
    ],
)
def test_a_fine_tune_is_published(tmp_path: Path, family: str, head: Head, labels: int, ran: set[str]) -> None:
    base = tiny_model(family, tmp_path / "base", tie=True)
    trained = tiny_headed(base, tmp_path / "trained", head, labels=labels)
    if head == "Model":
        as_sentence_transformer(trained)
    merge(base=base, fine_tune=trained, destination=tmp_path / "merged")
    chain = continue_chain(tmp_path)
    write_text(chain.text, documents=24, stride=5)
    validated = validate_chain(chain, tmp_path / "validated", base=base, windows=16, limits=RANDOM)

    outcomes = checks_of(validated)
    assert {name for name in ("head_logits", "label_agreement", "reward_order", "embedding_cosine")
            if outcomes[name].passed} == ran  # fmt: skip
    assert outcomes["kl_divergence"].skipped
    has_experts = family == "qwen3_next"  # Transformers knows no packed experts; docs/serving.md
    loading = outcomes["loads_in_transformers"]
    assert loading.outcome == ("warning" if has_experts else "passed"), loading.detail
    assert ("missing_keys: model.layers.0.mlp.experts." in loading.detail) == has_experts
    assert outcomes["structure"].passed, outcomes["structure"].detail
    assert isinstance(error := outcomes["padding_is_silent"].measured, float)
    assert error < 1e-5
    config = json.loads((chain.quantized / "config.json").read_text())
    if head != "Model":
        assert "-:.*score.*" in config["quantization_config"]["dynamic"]
        assert open_checkpoint(chain.quantized)["score.weight"].rows == labels
    release = publish(
        quantized=chain.quantized,
        validated=validated.path,
        destination=tmp_path / "release",
        base_model="base",
        fine_tune="it",
    ).path
    card = (release / "README.md").read_text()
    assert f"AutoModel{head.removeprefix('Model')}.from_pretrained" in card
    assert (release / "modules.json").is_file() == (head == "Model")
