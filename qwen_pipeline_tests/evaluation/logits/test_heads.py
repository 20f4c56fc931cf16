"""Streamed outputs of other heads, compared with Transformers and with plain formulas in float64."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.evaluation.heads import TEXT_TOKENS, HeadTask, task_of, texts_of
from qwen_pipeline.evaluation.logits.heads import compare_outputs, head_outputs
from qwen_pipeline.evaluation.logits.streamed import evaluate
from qwen_pipeline.layerwise.forward import LayerStream, advance
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.text.tokenizer_service import LoadedTokenizer
from qwen_pipeline_tests.tiny import tiny_model, tiny_qwen3, tiny_tokenizer
from qwen_pipeline_tests.tiny_heads import Head, as_sentence_transformer, load_headed, tiny_headed

CPU = ComputeContext(device=torch.device("cpu"), dtype=torch.float64)
PAD = tiny_tokenizer().pad_token_id
TOKENS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, PAD, PAD], [PAD, 3, 2, PAD, 1]])
BATCHES = list(TOKENS.split(1))


def streamed(root: Path) -> tuple[torch.Tensor, HeadTask]:
    model = open_checkpoint(root)
    stream = LayerStream(model, BATCHES, CPU)
    assert len(list(advance([stream]))) == 2
    return head_outputs(stream, BATCHES, task_of(model)), task_of(model)


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
@pytest.mark.parametrize(("family", "labels"), [("qwen3", 1), ("qwen3", 3), ("qwen3_5", 1)])
def test_logits_are_those_of_transformers(tmp_path: Path, head: Head, family: str, labels: int) -> None:
    """Delta nets compute in float32 whatever the dtype of the model is."""
    root = tiny_headed(tiny_model(family, tmp_path / "base"), tmp_path / "model", head, labels=labels)
    found, task = streamed(root)
    with torch.no_grad():
        expected = load_headed(root, head)(TOKENS).logits.reshape(-1, labels)
    tolerance = 1e-9 if family == "qwen3" else 1e-5
    assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
    assert (task.labels, task.is_reward) == (labels, labels == 1)


@pytest.mark.parametrize("pooling", ["lasttoken", "mean", "cls", "max", "weightedmean", "mean_sqrt_len_tokens"])
def test_embeddings_are_pooled_as_the_files_say(tmp_path: Path, pooling: str) -> None:
    root = tiny_headed(tiny_qwen3(tmp_path / "base"), tmp_path / "model", "Model")
    as_sentence_transformer(root, pooling=pooling)
    found, task = streamed(root)
    assert task.pooling == (pooling,)
    with torch.no_grad():
        states: Any = load_headed(root, "Model")(TOKENS).last_hidden_state
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    expected = {
        "lasttoken": states[:, -1],
        "mean": states.mean(1),
        "cls": states[:, 0],
        "max": states.max(1).values,
        "weightedmean": torch.einsum("bth,t->bh", states, weights / 15),
        "mean_sqrt_len_tokens": states.sum(1) / 5**0.5,
    }[pooling]
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_later_files_of_sentence_transformers_are_read_too(tmp_path: Path) -> None:
    root = as_sentence_transformer(tiny_headed(tiny_qwen3(tmp_path / "base"), tmp_path / "model", "Model"))
    file = root / "1_Pooling" / "config.json"
    file.write_text(json.dumps({"embedding_dimension": 64, "pooling_mode": ["mean", "max"]}))
    assert task_of(open_checkpoint(root)).pooling == ("mean", "max")
    assert streamed(root)[0].shape == (3, 128)
    file.write_text(json.dumps({"pooling_mode": "median"}))
    with pytest.raises(CheckpointRefused, match="the pooling median, expected lasttoken"):
        task_of(open_checkpoint(root))


def test_figures_are_plain_formulas() -> None:
    torch.manual_seed(0)
    reference = torch.randn(40, 3, dtype=torch.float64)
    outputs = reference + 0.5 * torch.randn(40, 3, dtype=torch.float64)
    found = compare_outputs(outputs, reference, HeadTask(kind="sequence", labels=3))
    deviations = reference - reference.mean(0)
    assert found.error == pytest.approx(
        ((outputs - reference).square().sum() / deviations.square().sum()).sqrt().item()
    )
    assert found.max_error == (outputs - reference).abs().max().item()
    assert found.agreement == sum(int(a.argmax() == b.argmax()) for a, b in zip(outputs, reference, strict=True)) / 40
    assert found.order is found.cosine is None

    rewards = compare_outputs(outputs[:, :1], reference[:, :1], HeadTask(kind="sequence", labels=1))
    pairs = [(i, j) for i in range(40) for j in range(40) if reference[i, 0] > reference[j, 0]]
    assert rewards.order == pytest.approx(sum(bool(outputs[i, 0] > outputs[j, 0]) for i, j in pairs) / len(pairs))
    assert rewards.agreement is None
    reverse = compare_outputs(-reference[:, :1], reference[:, :1], HeadTask(kind="token", labels=1))
    assert reverse.order == 0

    embedded = compare_outputs(outputs, reference, HeadTask(kind="embedding", pooling=("mean",)))
    cosines = [(a @ b / a.norm() / b.norm()).item() for a, b in zip(outputs, reference, strict=True)]
    assert embedded.cosine == pytest.approx(sum(cosines) / 40)
    assert embedded.min_cosine == pytest.approx(min(cosines))


def test_an_evaluation_compares_outputs_instead_of_predictions(tmp_path: Path) -> None:
    base = tiny_qwen3(tmp_path / "base")
    roots = {
        f"{seed}": tiny_headed(base, tmp_path / f"{seed}", "ForSequenceClassification", seed=seed) for seed in (1, 2)
    }
    models = {role: open_checkpoint(root) for role, root in roots.items()}
    task = task_of(models["1"])
    found = evaluate(models, list(TOKENS), reference="1", compared=["2"], context=CPU, task=task)
    assert found["1"].head is None
    assert found["2"].head == compare_outputs(streamed(roots["2"])[0], streamed(roots["1"])[0], task)
    assert found["2"].perplexity is found["2"].divergence is None
    assert len(found["2"].drift) == len(found["2"].peaks) == 2


def test_texts_end_as_the_tokenizer_ends_them() -> None:
    class AddsTokens(LoadedTokenizer):
        def encode_text(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return [1, *text.encode(), 2] if add_special_tokens else list(text.encode())

    windows = [[*range(10, 10 + 2 * TEXT_TOKENS)]] * 2
    pooled = texts_of(windows, AddsTokens(None), HeadTask(kind="embedding"))
    assert [len(text) for text in pooled] == [TEXT_TOKENS + 2] * 4
    assert pooled[1] == [1, *range(10 + TEXT_TOKENS, 10 + 2 * TEXT_TOKENS), 2]
    assert texts_of([[4, 5]], LoadedTokenizer(tiny_tokenizer()), HeadTask(kind="sequence")) == [[4, 5]]
    for kind in ("language", "token"):
        assert texts_of(windows, AddsTokens(None), replace(HeadTask(), kind=kind)) == windows
