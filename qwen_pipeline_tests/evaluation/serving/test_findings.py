"""Served answers: the first divergence from the reference, ties, and the reasons of failed servers."""

from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.evaluation.samples import MAX_NEW_TOKENS
from qwen_pipeline.evaluation.serving.findings import (
    FirstDivergence,
    ServedCompletion,
    ServerJob,
    ServingPlan,
    first_divergence,
    load_server_run,
    serving_report,
)
from qwen_pipeline.evaluation.serving.serve_all import serve_all
from qwen_pipeline.evaluation.serving.worker import serve
from qwen_pipeline.layerwise.decoding import Decoder
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.progress import Progress, unobserved
from qwen_pipeline.qwen.config import stop_tokens
from qwen_pipeline_tests import REPOSITORY
from qwen_pipeline_tests.evaluation.example_findings import SERVED
from qwen_pipeline_tests.evaluation.serving.vllm import (
    assert_served_where_there_is_a_kernel,
    has_kernel,
    served_by_vllm,
)
from qwen_pipeline_tests.evaluation.tasks.completions_server import DEADLY, NO_MESSAGE, STOP
from qwen_pipeline_tests.rounding import round_to_codes
from qwen_pipeline_tests.tiny import tiny_qwen2

ROOT = REPOSITORY
ANSWER = ServedCompletion(
    tokens=(5, 6, 9), ended=True, likeliest=({5: -0.1}, {6: -0.5, 7: -0.75}, {9: -0.25, 8: -6.25})
)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ((5, 6, 9), None),
        ((5, 7, 9), FirstDivergence(position=1, gap=0.25)),
        ((5, 6, 8), FirstDivergence(position=2, gap=6.0)),
        ((4, 6, 9), FirstDivergence(position=0, gap=inf)),
        ((5, 6), FirstDivergence(position=2, gap=inf)),
    ],
)
def test_an_answer_diverges_at_its_first_different_token(
    reference: tuple[int, ...], expected: FirstDivergence | None
) -> None:
    assert first_divergence(ANSWER, reference) == expected


def test_ties_pass_and_large_gaps_block() -> None:
    assert serving_report([SERVED], max_gap=0.5).detail == (
        "vllm serves padded on 3 ranks: 1 of 1 answers equal those of Transformers."
    )
    tie = serving_report([replace(SERVED, partings=(FirstDivergence(position=1, gap=0.3),))], max_gap=0.5)
    assert tie.passed
    assert "the others diverge at ties (largest gap 0.3 nats)" in tie.detail
    wrong = serving_report(
        [replace(SERVED, texts=("!" * 12,), partings=(FirstDivergence(position=1, gap=inf),))], max_gap=0.5
    )
    assert wrong.blocks
    assert wrong.detail == (
        "vllm: padded on 3 ranks: answer 1 differs from token 2 on; padded on 3 ranks: an answer contains '!' 12"
        " times in a row."
    )


def test_a_server_that_dies_blocks_and_a_missing_kernel_warns() -> None:
    died = serving_report([SERVED, replace(SERVED, degree=1, partings=(), fault="ValueError: no")], max_gap=0.5)
    assert died.blocks
    assert "padded on 1 rank: died: ValueError: no" in died.detail
    lacking = replace(SERVED, role="quantized", partings=(), fault="x", lacking="the engine has no kernel k")
    report = serving_report([SERVED, lacking], max_gap=0.5)
    assert (report.passed, report.severity, report.blocks) == (False, "WARN", False)
    assert (
        "quantized on 3 ranks is loaded by every rank, but cannot be computed on this machine: the engine has no"
        in report.detail
    )


def test_serving_that_compared_no_answer_is_skipped() -> None:
    lacking = replace(SERVED, partings=(), texts=(), fault="x", lacking="the engine has no kernel k")
    report = serving_report([lacking], max_gap=0.5)
    assert (report.outcome, report.blocks) == ("skipped", False)
    assert "the engine has no kernel k" in report.detail


def test_without_an_engine_the_check_is_skipped_with_the_reason() -> None:
    report = serving_report([], max_gap=0.5)
    assert (report.outcome, report.blocks) == ("skipped", False)
    assert "validation.serve.engine" in report.detail


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServerJob:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return ServerJob(
        root="/model",
        title="serve",
        degree=1,
        prompts=[[1, 6], [1, 20]],
        max_new_tokens=4,
        log=str(tmp_path / "serve.log"),
        ready_seconds=60,
        arguments=(),
        module="qwen_pipeline_tests.evaluation.tasks.completions_server",
    )


def test_a_server_is_started_queried_and_stopped(job: ServerJob) -> None:
    seen: list[Progress] = []
    served = load_server_run(serve(job.to_json(), seen.append))
    assert [answer.tokens for answer in served.answers] == [(7, 8, STOP), (21, 22, 23, 24)]
    assert [answer.ended for answer in served.answers] == [True, False]
    assert served.answers[0].likeliest[0] == {7: -0.1, 107: -0.4}
    assert seen[-1].done == seen[-1].total == 2


def test_a_server_is_asked_for_outputs_without_their_activation(job: ServerJob) -> None:
    whole = load_server_run(serve(replace(job, pooling="embed").to_json(), unobserved))
    assert (whole.fault, whole.outputs) == (None, ((1, 3, 1), (1, 10, 1)))
    tokens = load_server_run(serve(replace(job, pooling="token_classify").to_json(), unobserved))
    assert tokens.outputs == ((1, 3, 1), (6, 3, 1), (1, 10, 1), (20, 10, 1))


def test_a_server_that_dies_during_a_request_was_ready(job: ServerJob) -> None:
    died = load_server_run(serve(replace(job, prompts=[[DEADLY]]).to_json(), unobserved))
    assert died.ready
    assert died.fault == "AttributeError: '_OpNamespace' '_C' object has no attribute 'cpu_gemm'"


def test_an_exception_without_a_message_is_quoted_with_its_line(job: ServerJob) -> None:
    died = load_server_run(serve(replace(job, prompts=[[NO_MESSAGE]]).to_json(), unobserved))
    assert died.fault == "AssertionError (assert all(size % ranks == 0))"


def test_the_log_of_a_server_that_does_not_start_is_quoted(job: ServerJob) -> None:
    absent = load_server_run(serve(replace(job, module="no_such_server").to_json(), unobserved))
    assert not absent.ready
    assert "exited with code 1 before it was ready" in str(absent.fault)
    assert "No module named no_such_server" in str(absent.fault)


def test_an_engine_that_cannot_be_started_is_a_finding(tmp_path: Path) -> None:
    absent = ServingPlan(engine="vllm", python=tmp_path / "python", versions={}, degrees=(1,))
    (served,) = serve_all(
        absent,
        models={"quantized": tmp_path},
        prompts=[[5]],
        expected={"quantized": [(6,)]},
        decode=str,
        logs=tmp_path,
    )
    report = serving_report([served], max_gap=0.5)
    assert report.blocks
    assert f"quantized on 1 rank: did not start: {tmp_path}/python cannot be started" in report.detail


PROMPTS = [[5, 6, 7], [40, 41, 42, 43] * 16]


def answers_of(root: Path) -> list[tuple[int, ...]]:
    checkpoint = open_checkpoint(root)
    decoder = Decoder(checkpoint, ComputeContext(device=torch.device("cpu"), dtype=torch.float32))
    return decoder.answers(PROMPTS, stops=stop_tokens(checkpoint), limit=MAX_NEW_TOKENS)


@pytest.mark.serve
@pytest.mark.timeout(1800)
def test_vllm_answers_like_transformers_on_one_and_two_ranks(tmp_path: Path) -> None:
    """Run the real engine on random weights."""
    root = tiny_qwen2(tmp_path / "model", hidden_size=128, intermediate_size=256)
    served = served_by_vllm(root, "merged", PROMPTS, answers_of(root), logs=tmp_path)
    assert [each.fault for each in served] == [None, None]
    assert serving_report(served, max_gap=0.5).passed, served


@pytest.mark.serve
@pytest.mark.timeout(1800)
def test_vllm_serves_codes_on_one_rank_and_straddling_groups_fail_on_two(tmp_path: Path) -> None:
    """Two ranks load three groups of 64 without an error and answer wrongly; the groups differ like trained ones."""
    root = tiny_qwen2(tmp_path / "model", hidden_size=128, intermediate_size=192)
    tensors = load_file(root / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("down_proj.weight"):
            tensor[:, 64:128] *= 8
    tensors["lm_head.weight"] *= 4
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    codes = round_to_codes(root, tmp_path / "codes", group_size=64)
    served = served_by_vllm(codes, "quantized", PROMPTS, answers_of(codes), logs=tmp_path)
    if not has_kernel():
        assert_served_where_there_is_a_kernel(served)
        return
    whole, torn = served
    assert serving_report([whole], max_gap=0.5).passed, whole
    assert torn.fault is None
    assert serving_report([torn], max_gap=0.5).blocks, torn
