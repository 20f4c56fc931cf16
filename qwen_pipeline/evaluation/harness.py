"""The worker that runs lm-eval's tasks on checkpoints. Runs under the python of lm-eval's environment.

Transformers loads each model whole here, and accounts for every tensor: no score of random experts is ever reported.
Nothing is asked of a hub: data that is not there already has to be local files.
"""

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qwen_pipeline.corpus import load_tokenizer
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.loading import NotLoaded, load_model
from qwen_pipeline.progress import Observe, Progress

BOOTSTRAPS = 1000
"""Resamplings for the standard error of a metric that has no formula for it."""


def run_tasks(spec: Mapping[str, Any], observe: Observe) -> dict[str, Any]:
    """Run ``spec["tasks"]`` on ``spec["models"]``; return role -> ``task/metric`` -> value, stderr, direction.

    Raises:
        InputRefused: A task is unknown, its data is not there, or a model does not load.
    """
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = TaskManager(include_path=spec["include"])
    found: dict[str, Any] = {}
    for number, (role, root) in enumerate(spec["models"].items()):
        observe(Progress(task="lm-eval", done=number, total=len(spec["models"]), remark=role))
        found[role] = _scores(_evaluate(root, spec, manager))
        gc.collect()
    observe(Progress(task="lm-eval", done=len(found), total=len(found)))
    return found


def _evaluate(root: str, spec: Mapping[str, Any], manager: Any) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    device = torch.device(spec["device"])
    try:
        model: Any = load_model(root).to(device)
    except NotLoaded as fault:
        raise InputRefused(f"{root} does not load: {fault}", remedy="See the check loads_in_transformers.") from fault
    try:
        return simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=load_tokenizer(Path(root)), batch_size=1),
            tasks=list(spec["tasks"]),
            limit=spec["limit"],
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=BOOTSTRAPS,
        )
    except (KeyError, ValueError, OSError) as error:
        raise InputRefused(
            f"lm-eval cannot run {', '.join(spec['tasks'])}: {type(error).__name__}: {str(error)[:400]}",
            remedy="Name tasks that lm-eval lists or that validation.lm_eval.include holds, with local data.",
        ) from error


def _scores(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return ``task/metric`` -> value, standard error and direction of every number that lm-eval computed."""
    found: dict[str, dict[str, Any]] = {}
    for task, metrics in results["results"].items():
        upward = results["higher_is_better"].get(task, {})
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or not kind or not isinstance(value, int | float):
                continue
            name = f"{task}/{metric}" + ("" if kind == "none" else f",{kind}")
            error = metrics.get(f"{metric}_stderr,{kind}")
            found[name] = {
                "value": float(value),
                "stderr": float(error) if isinstance(error, int | float) else None,
                "more_is_better": bool(upward.get(metric, True)),
            }
    return found
