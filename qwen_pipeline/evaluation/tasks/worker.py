"""The worker that runs lm-eval tasks on checkpoints. It runs under the Python of lm-eval's environment.

It works offline: datasets must be cached or local files.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.progress import Observe

BOOTSTRAPS = 1000
"""Bootstrap samples for the standard error of metrics without a formula for it."""


def run_tasks(spec: Mapping[str, Any], observe: Observe) -> dict[str, Any]:
    """Run ``spec["tasks"]`` on ``spec["models"]``; return role -> ``task/metric`` -> value, stderr, direction.

    Raises:
        InputRefused: A task is unknown, its data is missing, or it needs answers that are not greedy.
        CheckpointRefused: A tensor of a model is missing or has another shape.
    """
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = TaskManager(include_path=spec["include"])
    return {role: _scores(_evaluate(role, root, spec, manager, observe)) for role, root in spec["models"].items()}


def _evaluate(role: str, root: str, spec: Mapping[str, Any], manager: Any, observe: Observe) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]

    from qwen_pipeline.evaluation.tasks.streamed_lm import StreamedLM

    context = ComputeContext(device=torch.device(spec["device"]), dtype=torch.float32)
    model = StreamedLM(
        Path(root),
        context,
        observe=lambda progress: observe(replace(progress, task=f"lm-eval {role}: {progress.task}")),
    )
    try:
        return simple_evaluate(
            model=model,
            tasks=list(spec["tasks"]),
            limit=spec["limit"],
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=BOOTSTRAPS,
        )
    except (KeyError, ValueError, OSError) as error:
        raise InputRefused(
            f"lm-eval cannot run {', '.join(spec['tasks'])}: {type(error).__name__}: {str(error)[:400]}",
            remedy="Use tasks of lm-eval or of the directory validation.lm_eval.include, with cached or local data.",
        ) from error


def _scores(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return ``task/metric`` -> value, standard error and direction of every metric."""
    found: dict[str, dict[str, Any]] = {}
    for task, metrics in results["results"].items():
        higher_is_better = results["higher_is_better"].get(task, {})
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or not kind or not isinstance(value, int | float):
                continue
            name = f"{task}/{metric}" + ("" if kind == "none" else f",{kind}")
            error = metrics.get(f"{metric}_stderr,{kind}")
            found[name] = {
                "value": float(value),
                "stderr": float(error) if isinstance(error, int | float) else None,
                "more_is_better": bool(higher_is_better.get(metric, True)),
            }
    return found
