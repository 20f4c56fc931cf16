"""Serve a checkpoint with the real vLLM."""

import os
from collections.abc import Sequence
from pathlib import Path

from qwen_pipeline.evaluation.heads import HeadTask
from qwen_pipeline.evaluation.serving.findings import ServedRole, ServingFindings, ServingPlan, serving_report
from qwen_pipeline.evaluation.serving.serve_all import has_avx512, serve_all, serve_heads
from qwen_pipeline.workers.environments import WorkerEnvironment, find_environment


def served_by_vllm(
    root: Path, role: ServedRole, prompts: Sequence[Sequence[int]], expected: Sequence[Sequence[int]], *, logs: Path
) -> list[ServingFindings]:
    """Query vLLM for CPUs, or the engine in ``SERVING_ENGINE``, on one and on two ranks; compare its answers."""
    return serve_all(
        _plan(role, 1, 2), models={role: root}, prompts=prompts, expected={role: expected}, decode=str, logs=logs
    )


def pooled_by_vllm(
    root: Path,
    role: ServedRole,
    task: HeadTask,
    texts: Sequence[Sequence[int]],
    expected: Sequence[Sequence[float]],
    *,
    logs: Path,
) -> list[ServingFindings]:
    """Ask the same engine, on one rank, for the outputs of a model with another head; compare them."""
    return serve_heads(_plan(role, 1), models={role: root}, task=task, texts=texts, expected=expected, logs=logs)


def vllm_environment() -> WorkerEnvironment:
    """Return vLLM for CPUs, or the engine in ``SERVING_ENGINE``, installed or with the python ``SERVING_PYTHON``."""
    name, python = os.environ.get("SERVING_ENGINE", "vllm-cpu"), os.environ.get("SERVING_PYTHON")
    return find_environment(name, Path(python) if python else None)


def _plan(role: ServedRole, *degrees: int) -> ServingPlan:
    engine = vllm_environment()
    return ServingPlan(
        engine="vllm-cpu", python=engine.python, versions=engine.versions(), degrees=degrees, models=(role,)
    )


def has_kernel() -> bool:
    """Return whether the engine of these tests can compute with GPTQ codes on this machine."""
    return "SERVING_ENGINE" in os.environ or has_avx512()


def assert_served_where_there_is_a_kernel(served: Sequence[ServingFindings]) -> None:
    """Assert that codes give the reference answers if the engine has a kernel, and else that the lack is named."""
    if has_kernel():
        assert serving_report(served, max_gap=0.5).passed, served
    else:
        assert all("needs AVX512" in str(each.lacking) for each in served), served
