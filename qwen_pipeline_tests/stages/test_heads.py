"""Classifiers, reward models and embedding models pass merging and padding; Transformers and PEFT are the oracles."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.errors import AdapterRefused, CheckpointRefused, InputRefused
from qwen_pipeline.models.open import open_model
from qwen_pipeline.qwen.families import FAMILIES
from qwen_pipeline.qwen.heads import further_steps, head_kind
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.reports import load_reports
from qwen_pipeline.stages.merge import merge
from qwen_pipeline.stages.merge_pad import merge_pad
from qwen_pipeline.stages.pad import pad
from qwen_pipeline_tests.layouts import Layout
from qwen_pipeline_tests.tiny import tiny_adapter, tiny_model, tiny_qwen3, tiny_tokenizer
from qwen_pipeline_tests.tiny_heads import (
    SCORED_FAMILIES,
    TASKS,
    Head,
    as_sentence_transformer,
    load_headed,
    tiny_headed,
    tiny_headed_adapter,
)

PAD = tiny_tokenizer().pad_token_id
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, PAD, PAD]])
WIDER = PaddingSpec(group_size=32, tensor_parallel=2)
HEADS: tuple[Head, ...] = ("ForSequenceClassification", "ForTokenClassification", "Model")


@torch.inference_mode()
def answers(model: Any) -> torch.Tensor:
    outputs = model(IDS)
    return outputs.last_hidden_state if "logits" not in outputs else outputs.logits


def config_of(root: Path) -> dict[str, Any]:
    return json.loads((root / "config.json").read_text())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", SCORED_FAMILIES)
def test_a_full_fine_tune_with_another_head_is_merged_and_padded(tmp_path: Path, family: str, head: Head) -> None:
    layout: Layout = "mtp" if FAMILIES[family].drafts else "saved"
    base = tiny_model(family, tmp_path / "base", tie=family == "qwen3", layout=layout)
    trained = tiny_headed(base, tmp_path / "trained", head)
    merged = merge(base=base, fine_tune=trained, destination=tmp_path / "merged")
    padded = pad(source=merged.path, destination=tmp_path / "padded", spec=WIDER)

    expected = answers(load_headed(trained, head))
    assert torch.equal(answers(load_headed(merged.path, head)), expected)
    assert torch.allclose(answers(load_headed(padded.path, head)), expected, rtol=0, atol=1e-12)
    reports = load_reports(merged.manifest.result)
    assert all(report.passed for report in reports)
    if family != "qwen3":
        used = next(report.detail for report in reports if report.name == "every_tensor_is_used")
        assert " lm_head.weight" in used
        assert "of the base is left out" in used
        assert ("mtp." in used) == FAMILIES[family].drafts
    assert not any(name.startswith("mtp.") for name in open_checkpoint(padded.path))
    for artifact in (merged, padded):
        for field in ("architectures", "id2label", "label2id", "pad_token_id"):
            assert config_of(artifact.path).get(field) == config_of(trained).get(field)
    assert any(size.zeros for size in [*_sizes(padded)])


def _sizes(padded: Any) -> list[Any]:
    from qwen_pipeline.qwen.geometry import load_plan

    return list(load_plan(padded.manifest.result["padding"]).sizes)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("family", "layout", "tie"), [("qwen3", "saved", True), ("qwen3_next", "mtp", False), ("qwen3_5", "mtp", False)]
)
def test_an_adapter_brings_its_head(tmp_path: Path, head: Head, family: str, layout: Layout, tie: bool) -> None:
    """PEFT merges in float64; a float32 base makes the merge exact but for its one rounding."""
    base = tiny_model(family, tmp_path / "base", tie=tie, dtype=torch.float32, layout=layout)
    adapter = tiny_headed_adapter(base, tmp_path / "adapter", head)
    merged = merge(base=base, fine_tune=adapter, destination=tmp_path / "merged")
    padded = pad(source=merged.path, destination=tmp_path / "padded", spec=WIDER)

    theirs: Any = PeftModel.from_pretrained(load_headed(base, head, num_labels=3, pad_token_id=PAD), str(adapter))
    expected = answers(theirs.merge_and_unload())
    for root in (merged.path, padded.path):
        assert torch.allclose(answers(load_headed(root, head)), expected, rtol=1e-5, atol=1e-5)
    config = config_of(padded.path)
    assert config["architectures"] == [f"{FAMILIES[family].scored}{head}"]
    assert not any(name.startswith("mtp.") for name in open_checkpoint(merged.path))
    if head != "Model":
        assert len(config["id2label"]) == 3
        assert config.get("text_config", config)["pad_token_id"] == PAD
    assert all(report.passed for report in load_reports(merged.manifest.result))


def test_labels_are_named_by_the_config_beside_an_adapter(tmp_path: Path) -> None:
    base = tiny_qwen3(tmp_path / "base")
    adapter = tiny_headed_adapter(base, tmp_path / "adapter", "ForSequenceClassification", labels=2)
    unnamed = merge(base=base, fine_tune=adapter, destination=tmp_path / "unnamed")
    labels = {"id2label": {"0": "ham", "1": "spam"}, "problem_type": "single_label_classification"}
    (adapter / "config.json").write_text(json.dumps(labels))
    named = merge(base=base, fine_tune=adapter, destination=tmp_path / "named")
    assert config_of(unnamed.path)["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
    assert config_of(named.path)["id2label"] == {"0": "ham", "1": "spam"}
    assert config_of(named.path)["problem_type"] == "single_label_classification"


def test_an_adapter_continues_a_classifier(tmp_path: Path) -> None:
    base = tiny_qwen3(tmp_path / "base", dtype=torch.float32)
    first = merge(
        base=base, fine_tune=tiny_headed(base, tmp_path / "first", "ForSequenceClassification"),
        destination=tmp_path / "classifier",
    ).path  # fmt: skip
    for labels in (3, 5):
        adapter = tmp_path / f"{labels}"
        if labels == 3:
            tiny_headed_adapter(first, adapter, "ForSequenceClassification")
        else:  # new labels: PEFT saves a head of another size
            tiny_headed_adapter(base, adapter, "ForSequenceClassification", labels=5)
        merged = merge(base=first, fine_tune=adapter, destination=tmp_path / f"merged {labels}").path
        assert len(config_of(merged)["id2label"]) == labels
        assert open_checkpoint(merged)["score.weight"].rows == labels
        theirs: Any = load_headed(base, "ForSequenceClassification", num_labels=labels, pad_token_id=PAD)
        state = {name: tensor.double() for name, tensor in load_file(first / "model.safetensors").items()}
        theirs.load_state_dict({k: v for k, v in state.items() if not k.startswith("score")}, strict=False)
        expected = answers(PeftModel.from_pretrained(theirs, str(adapter)).merge_and_unload())
        assert torch.allclose(answers(load_headed(merged, "ForSequenceClassification")), expected, rtol=2e-2, atol=2e-2)


def test_one_pass_and_its_recipe_are_the_two_stages(tmp_path: Path) -> None:
    base = tiny_qwen3(tmp_path / "base", tie=True)
    for head in HEADS:
        adapter = tiny_headed_adapter(base, tmp_path / f"adapter {head}", head)
        two = merge(base=base, fine_tune=adapter, destination=tmp_path / f"two {head}")
        one, padded = merge_pad(
            base=base,
            fine_tune=adapter,
            merged=tmp_path / f"one {head}",
            padded=tmp_path / f"padded {head}",
            spec=WIDER,
        )
        assert one.manifest.content_digest == two.manifest.content_digest
        assert head_kind(open_model(one.path)) == head_kind(open_checkpoint(padded.path)) != "language"


def test_a_published_embedding_model_is_a_base(tmp_path: Path) -> None:
    """Qwen's embedding models declare the causal class and an untied head, but store none, and no prefix."""
    base = as_sentence_transformer(tiny_headed(tiny_qwen3(tmp_path / "causal"), tmp_path / "base", "Model"))
    config = config_of(base)
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3ForCausalLM"]}))
    tensors = load_file(base / "model.safetensors")
    save_file({n.removeprefix("model."): t for n, t in tensors.items()}, base / "model.safetensors")
    trained = tiny_headed(base, tmp_path / "trained", "Model")
    (trained / "config.json").write_text(json.dumps(config_of(base)))
    whole = merge(base=base, fine_tune=trained, destination=tmp_path / "whole").path
    assert head_kind(open_checkpoint(whole)) == "embedding"
    assert torch.equal(answers(load_headed(whole, "Model")), answers(load_headed(trained, "Model")))

    adapter = tiny_headed_adapter(base, tmp_path / "adapter", "Model")
    merged = merge(base=base, fine_tune=adapter, destination=tmp_path / "merged").path
    padded = pad(source=merged, destination=tmp_path / "padded", spec=WIDER).path
    assert head_kind(open_checkpoint(padded)) == "embedding"
    assert config_of(padded)["architectures"] == ["Qwen3ForCausalLM"]
    for path in ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"):
        assert (padded / path).read_bytes() == (base / path).read_bytes()
    theirs: Any = PeftModel.from_pretrained(load_headed(base, "Model"), str(adapter))
    expected = answers(theirs.merge_and_unload())
    assert torch.allclose(answers(load_headed(padded, "Model")), expected, rtol=2e-2, atol=2e-2)


def test_the_modules_of_a_fine_tuned_embedding_model_are_carried_along(tmp_path: Path) -> None:
    base = tiny_qwen3(tmp_path / "base", tie=True)
    trained = as_sentence_transformer(tiny_headed(base, tmp_path / "trained", "Model"), pooling="mean")
    dense = {"path": "2_Dense", "type": "sentence_transformers.models.Dense", "name": "2", "idx": 2}
    steps = json.loads((trained / "modules.json").read_text())
    (trained / "modules.json").write_text(json.dumps([*steps[:2], dense]))
    (trained / "2_Dense").mkdir()
    (trained / "2_Dense/config.json").write_text(json.dumps({"in_features": 64, "out_features": 8, "bias": False}))
    save_file({"linear.weight": torch.ones(8, 64)}, trained / "2_Dense/model.safetensors")
    merged = merge(base=base, fine_tune=trained, destination=tmp_path / "merged").path
    padded = pad(source=merged, destination=tmp_path / "padded", spec=WIDER).path
    for path in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"):
        assert (padded / path).read_bytes() == (trained / path).read_bytes(), path
    assert further_steps(open_checkpoint(padded)) == ["2_Dense"]
    (trained / "modules.json").unlink()
    with pytest.raises(InputRefused, match=r"does not read: 2_Dense/model\.safetensors"):
        merge(base=base, fine_tune=trained, destination=tmp_path / "again")


def test_an_adapter_of_a_padded_classifier_merges_into_the_live_base(tmp_path: Path) -> None:
    live = tiny_qwen3(tmp_path / "live", dtype=torch.float32)
    padded = pad(
        source=live,
        destination=tmp_path / "padded",
        spec=PaddingSpec(group_size=32, tensor_parallel=2, layout="append"),
    ).path
    adapter = tiny_headed_adapter(padded, tmp_path / "adapter", "ForSequenceClassification", target_modules=["q_proj"])
    here = merge(base=padded, fine_tune=adapter, destination=tmp_path / "here").path
    there = merge(base=live, fine_tune=adapter, destination=tmp_path / "there").path
    ours, theirs = (answers(load_headed(root, "ForSequenceClassification")) for root in (there, here))
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_heads_that_cannot_be_merged_are_refused_by_name(tmp_path: Path) -> None:
    base = tiny_qwen3(tmp_path / "base")
    adapter = tiny_headed_adapter(base, tmp_path / "adapter", "ForSequenceClassification")
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({n: t for n, t in weights.items() if "score" not in n}, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterRefused, match=r"SEQ_CLS, but neither it nor the base has score\.weight"):
        merge(base=base, fine_tune=adapter, destination=tmp_path / "out")

    valued = tmp_path / "valued"
    tiny_qwen3(valued, seed=3)
    tensors = load_file(valued / "model.safetensors")
    head = {"v_head.summary.weight": torch.zeros(1, 64), "v_head.summary.bias": torch.zeros(1)}
    save_file(tensors | head, valued / "model.safetensors")
    with pytest.raises(CheckpointRefused, match=r"v_head\.summary\.\w+ belongs to a value head") as refusal:
        merge(base=base, fine_tune=valued, destination=tmp_path / "out")
    assert "Qwen3ForTokenClassification" in (refusal.value.remedy or "")
    renamed = {
        name.replace("v_head.summary", "score"): t for name, t in (tensors | head).items() if "lm_head" not in name
    }
    save_file(renamed, valued / "model.safetensors")
    config = config_of(valued) | {"architectures": ["Qwen3ForTokenClassification"]}
    (valued / "config.json").write_text(json.dumps(config))
    merged = merge(base=base, fine_tune=valued, destination=tmp_path / "rewards").path
    assert config_of(merged)["id2label"] == {"0": "LABEL_0"}  # the stored score decides
    assert head_kind(open_checkpoint(merged)) == "token"

    both = tmp_path / "both"
    tiny_qwen3(both, seed=3)
    save_file(tensors | {"score.weight": torch.zeros(2, 64)}, both / "model.safetensors")
    with pytest.raises(CheckpointRefused, match=r"Both score\.weight and lm_head\.weight"):
        merge(base=base, fine_tune=both, destination=tmp_path / "out")


def test_a_value_head_in_a_file_of_its_own_is_refused(tmp_path: Path) -> None:
    base = tiny_qwen3(tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / "adapter")
    save_file({"v_head.summary.weight": torch.zeros(1, 64)}, adapter / "value_head.safetensors")
    with pytest.raises(InputRefused, match=r"weights that a merge does not read: value_head\.safetensors"):
        merge(base=base, fine_tune=adapter, destination=tmp_path / "out")


def test_a_classifier_made_of_an_embedding_model_is_none(tmp_path: Path) -> None:
    causal = tiny_qwen3(tmp_path / "causal")
    base = as_sentence_transformer(tiny_headed(causal, tmp_path / "base", "Model"))
    trained = tiny_headed(base, tmp_path / "trained", "ForSequenceClassification")
    merged = merge(base=base, fine_tune=trained, destination=tmp_path / "merged").path
    assert head_kind(open_checkpoint(merged)) == "sequence"
    assert "model.layers.0.mlp.up_proj.weight" in open_checkpoint(merged)  # the base stores it without the prefix
    assert not list(merged.rglob("modules.json")) + list(merged.rglob("1_Pooling"))
    found, expected = (answers(load_headed(root, "ForSequenceClassification")) for root in (merged, trained))
    assert torch.equal(found, expected)
    adapter = tiny_headed_adapter(base, tmp_path / "adapter", "ForSequenceClassification")
    merged = merge(base=base, fine_tune=adapter, destination=tmp_path / "adapted").path
    assert "model.layers.0.mlp.up_proj.weight" in open_checkpoint(merged)
    theirs: Any = load_headed(base, "ForSequenceClassification", num_labels=3, pad_token_id=PAD)
    expected = answers(PeftModel.from_pretrained(theirs, str(adapter)).merge_and_unload())
    assert torch.allclose(answers(load_headed(merged, "ForSequenceClassification")), expected, rtol=2e-2, atol=2e-2)


def test_a_classifier_without_its_bias_is_refused(tmp_path: Path) -> None:
    base = tiny_qwen3(tmp_path / "base")
    trained = tiny_headed(base, tmp_path / "trained", "ForTokenClassification")
    tensors = load_file(trained / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n != "score.bias"}, trained / "model.safetensors")
    with pytest.raises(CheckpointRefused, match="no bias is stored"):
        merge(base=base, fine_tune=trained, destination=tmp_path / "out")


def test_a_family_without_such_classes_refuses_them(tmp_path: Path) -> None:
    base = tiny_model("qwen3_vl", tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / "adapter", task_type=TASKS["ForSequenceClassification"])
    with pytest.raises(InputRefused, match="not supported for models of type qwen3_vl"):
        merge(base=base, fine_tune=adapter, destination=tmp_path / "out")
    embedder = tiny_adapter(base, tmp_path / "embedder", task_type=TASKS["Model"])  # of a retriever, by its whole model
    merged = merge(base=base, fine_tune=embedder, destination=tmp_path / "out").path
    assert config_of(merged)["architectures"] == config_of(base)["architectures"]
