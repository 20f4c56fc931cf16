"""vLLM's pooling runner computes what Transformers computes of classifiers, reward models and embedding models."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.evaluation.head_checks import served_heads_report
from qwen_pipeline.evaluation.heads import HeadTask, task_of
from qwen_pipeline.evaluation.limits import Limits
from qwen_pipeline.evaluation.serving.findings import ServedRole, ServingFindings
from qwen_pipeline.evaluation.serving.serve_all import POOLING_TASKS
from qwen_pipeline.evaluation.serving.worker import pooling_request
from qwen_pipeline.workers.parent import run_worker
from qwen_pipeline_tests.codes import Packing, replace_mlps_by_codes
from qwen_pipeline_tests.evaluation.serving.vllm import has_kernel, pooled_by_vllm, vllm_environment
from qwen_pipeline_tests.tiny import tiny_model
from qwen_pipeline_tests.tiny_heads import Head, as_sentence_transformer, load_headed, tiny_headed

TEXTS = [[(7 * number + step * step) % 200 + 5 for step in range(12)] for number in range(16)]
HEADS: dict[str, Any] = {"hidden_size": 128, "head_dim": 32}
"""The smallest heads that vLLM's attention has on a CPU."""
CLOSE = Limits(max_head_error=0.05, min_label_agreement=0.99, min_reward_order=0.95, min_embedding_cosine=0.999)
"""Limits for the same weights, in 16 bits in vLLM and in float32 in Transformers; a label may differ at a tie."""


@torch.inference_mode()
def outputs_of(root: Path, head: Head, task: HeadTask) -> list[list[float]]:
    """Return what Transformers computes: logits, or the mean of the hidden states."""
    model: Any = load_headed(root, head, dtype=torch.float32)
    tokens = torch.tensor(TEXTS)
    if head == "Model":
        return model(tokens).last_hidden_state.mean(dim=1).tolist()
    logits = model(tokens).logits
    return logits.flatten(0, -2).tolist() if task.kind == "token" else logits.tolist()


def served(root: Path, head: Head, role: ServedRole, logs: Path) -> tuple[HeadTask, list[ServingFindings]]:
    task = task_of(open_checkpoint(root))
    return task, pooled_by_vllm(root, role, task, TEXTS, outputs_of(root, head, task), logs=logs)


@pytest.mark.serve
@pytest.mark.timeout(600)
def test_vllm_reads_every_field_of_a_request(tmp_path: Path) -> None:
    tasks = list(POOLING_TASKS.values())
    target = "qwen_pipeline_tests.evaluation.serving.vllm_lookups:pooling_requests"
    job = {"bodies": [pooling_request([1, 2, 3], task) for task in tasks]}
    read = run_worker(vllm_environment().python, target, job, log=tmp_path / "log").value
    assert read["found"] == [[[1, 2, 3], task, False, task, []] for task in tasks]


@pytest.mark.serve
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("family", "head", "labels"),
    [
        ("qwen3", "ForSequenceClassification", 3),
        ("qwen2", "ForSequenceClassification", 1),
        ("qwen3", "ForTokenClassification", 3),
        ("qwen3", "Model", 0),
    ],
)
def test_vllm_computes_the_outputs_of_transformers(tmp_path: Path, family: str, head: Head, labels: int) -> None:
    base = tiny_model(family, tmp_path / "base", tie=True, **HEADS)
    root = tiny_headed(base, tmp_path / "model", head, labels=labels)
    if head == "Model":
        as_sentence_transformer(root, pooling="mean", normalize=False)
    task, found = served(root, head, "merged", tmp_path)
    report = served_heads_report(found, task, CLOSE)
    assert report.passed, report.detail


@pytest.mark.serve
@pytest.mark.timeout(600)
def test_vllm_computes_outputs_from_codes_or_the_check_is_skipped(tmp_path: Path) -> None:
    base = tiny_model("qwen3", tmp_path / "base", tie=True, **HEADS)
    root = tiny_headed(base, tmp_path / "model", "ForSequenceClassification")
    replace_mlps_by_codes(root, Packing(method="gptq", group_size=32))
    task = task_of(open_checkpoint(root))
    found = pooled_by_vllm(root, "quantized", task, TEXTS, [[0.0, 0.0, 0.0]] * len(TEXTS), logs=tmp_path)
    report = served_heads_report(found, task, Limits(max_head_error=float("inf"), min_label_agreement=0))
    assert report.outcome == ("passed" if has_kernel() else "skipped"), report.detail
