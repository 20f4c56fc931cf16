"""Gather the findings of a validation: structure, sharding, predictions, answers, serving and benchmark tasks."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import CheckpointRefused, PipelineError
from qwen_pipeline.evaluation.behaviour.ask import Requests, behaviour_of
from qwen_pipeline.evaluation.behaviour.findings import Behaviour
from qwen_pipeline.evaluation.figures import DivergenceFigures, ModelFigures
from qwen_pipeline.evaluation.findings import BASE, MERGED, PADDED, QUANTIZED, Findings
from qwen_pipeline.evaluation.measurement import MEASURING_ENVIRONMENT, Measurement, sharding_role
from qwen_pipeline.evaluation.plan import ValidationPlan
from qwen_pipeline.evaluation.samples import Completion, Sample
from qwen_pipeline.evaluation.serving.findings import ServingFindings, ServingPlan
from qwen_pipeline.evaluation.serving.serve_all import serve_all, serve_heads
from qwen_pipeline.evaluation.tasks.plan import RUN_TASKS, TaskPlan, load_results, scores
from qwen_pipeline.evaluation.tensor_parallel.find import (
    PlannedTarget,
    assess_targets,
    plan_targets,
    shardings_of,
    shardings_with_effect,
    simulated_targets,
    with_divergences,
)
from qwen_pipeline.evaluation.tensor_parallel.findings import (
    ANY_ENGINE,
    ShardedModules,
    Sharding,
    Target,
)
from qwen_pipeline.evaluation.tensor_parallel.floats import assess_float_targets, find_float_targets
from qwen_pipeline.progress import Observe
from qwen_pipeline.qwen.config import stop_tokens
from qwen_pipeline.qwen.heads import further_steps
from qwen_pipeline.text.tokenizers import Tokenizer
from qwen_pipeline.transforms.codes.fp8 import is_fp8
from qwen_pipeline.workers.parent import Worker, run_worker

SERVED_TEXTS, SERVED_WINDOWS = 64, 4
"""The most texts that a serving engine classifies or embeds, and windows whose tokens it classifies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedModels:
    """The models of a validation, opened and ready to be measured.

    Attributes:
        roots: Role -> directory.
        checkpoints: Role -> checkpoint.
        tokenizer: The reference's tokenizer.
        measurement: The measurement of the worker, without the comparison of weights.
        requests: The requests whose prompts are in the measurement.
    """

    roots: Mapping[str, Path]
    checkpoints: Mapping[str, Checkpoint]
    tokenizer: Tokenizer
    measurement: Measurement
    requests: Requests


def gather_findings(
    models: OpenedModels,
    plan: ValidationPlan,
    *,
    worker: Worker,
    logs: Path,
    observe: Observe,
) -> tuple[Findings, int]:
    """Make all measurements of a plan; return the findings and the peak memory of the worker in bytes.

    Args:
        models: The opened models.
        plan: The plan.
        worker: A worker for :data:`~qwen_pipeline.evaluation.measurement.MEASURE` that has no task yet.
        logs: The directory for the logs of workers and servers.
        observe: Called with the progress of each step.
    """
    from qwen_pipeline.evaluation.measured import Measured

    checkpoints = models.checkpoints
    quantized = checkpoints[QUANTIZED]
    is_floats = is_fp8(quantized.config.get("quantization_config") or {})
    planned = _planned(quantized, plan.targets or [Target(engine=ANY_ENGINE, degree=plan.tensor_parallel)])
    measurement = replace(
        models.measurement,
        structure=True,
        shardings=shardings_of(planned),
        unruled=plan.serving is not None,
        outputs=len(_served_texts(models.measurement)) * _outputs_of(models.measurement) if plan.serving else 0,
    )
    log, is_language = logs / "validate.log", measurement.task.kind == "language"
    result = worker.run(measurement.to_json(), log=log, observe=observe)
    measured = Measured.from_json(result.value)
    figures, shardings = measured.figures, shardings_with_effect(quantized, measured.shardings)
    assert measured.structure, "it was requested"
    findings = Findings(
        structure=measured.structure,
        models={role: figures[role] for role in models.roots},
        nbytes={role: checkpoint.nbytes for role, checkpoint in checkpoints.items()},
        samples=_samples(plan.prompts, figures, models) if is_language else [],
        parallel=(assess_float_targets if is_floats else assess_targets)(
            quantized.config, plan.tensor_parallel, plan.targets
        ),
        targets=with_divergences(simulated_targets(planned, measured.shardings), _divergences(shardings, figures)),
        task=measurement.task,
        behaviour=_behaviour(figures, models),
    )
    if plan.serving:
        served = (
            _serve(plan.serving, models, figures, logs, observe)
            if is_language
            else _serve_heads(plan.serving, models, measured.outputs, logs, observe)
        )
        findings = replace(findings, served=served)
    if plan.tasks and is_language and not any(figures[role].fault for role in (MERGED, QUANTIZED)):
        findings = _with_scores(findings, plan.tasks, models, logs, observe)
    return findings, result.peak_memory_bytes


def _planned(candidate: Checkpoint, targets: Sequence[Target]) -> list[PlannedTarget]:
    """Return the targets, judged by their rules; none if the config describes no codes, which is a finding itself."""
    try:
        if is_fp8(candidate.config.get("quantization_config") or {}):
            return [(row, None) for row in find_float_targets(candidate.config, targets)]
        return plan_targets(candidate.config, targets)
    except CheckpointRefused:
        return []


def _divergences(
    shardings: Mapping[Sharding, ShardedModules], figures: Mapping[str, ModelFigures]
) -> dict[Sharding, DivergenceFigures | None]:
    measured = [figures.get(sharding_role(number)) for number in range(len(shardings))]
    return {sharding: found.divergence if found else None for sharding, found in zip(shardings, measured, strict=True)}


def _samples(prompts: Sequence[str], figures: Mapping[str, ModelFigures], models: OpenedModels) -> list[Sample]:
    answers = {
        role: _completions(figures[role], stop_tokens(models.checkpoints[role]), models.tokenizer)
        for role in (MERGED, QUANTIZED)
        if figures[role].answers
    }
    return [
        Sample(
            prompt=prompt,
            reference=answers[MERGED][number] if MERGED in answers else None,
            candidate=answers[QUANTIZED][number] if QUANTIZED in answers else None,
        )
        for number, prompt in enumerate(prompts)
    ]


def _behaviour(figures: Mapping[str, ModelFigures], models: OpenedModels) -> Behaviour:
    roles = (MERGED, QUANTIZED)
    return behaviour_of(
        models.requests,
        {role: figures[role] for role in roles},
        {role: stop_tokens(models.checkpoints[role]) for role in roles},
        models.tokenizer,
    )


def _completions(figures: ModelFigures, stops: Collection[int], tokenizer: Tokenizer) -> list[Completion]:
    texts = map(tokenizer.decode, figures.answers)
    return [
        Completion(text=text, tokens=tokens, ended=tokens[-1] in stops)
        for text, tokens in zip(texts, figures.answers, strict=True)
    ]


def _serve(
    plan: ServingPlan, models: OpenedModels, figures: Mapping[str, ModelFigures], logs: Path, observe: Observe
) -> list[ServingFindings]:
    """Serve checkpoints; a padded one must answer like the merged one, because they compute the same function.

    The server does not read generation configs, so its answers are compared with those without their rules.
    """
    of_role = {role: figures[MERGED if role == PADDED else role] for role in models.roots if role != BASE}
    return serve_all(
        plan,
        models=models.roots,
        prompts=models.measurement.prompts,
        expected={role: found.unruled_answers or found.answers for role, found in of_role.items()},
        decode=models.tokenizer.decode,
        logs=logs,
        observe=observe,
    )


def _serve_heads(
    plan: ServingPlan, models: OpenedModels, outputs: Sequence[Sequence[float]], logs: Path, observe: Observe
) -> list[ServingFindings]:
    """Serve checkpoints with another head, unless the engine would compute steps that are not computed here."""
    task = models.measurement.task
    if task.kind == "embedding" and (steps := further_steps(models.checkpoints[MERGED])):
        reason = f"the engine also computes what follows the pooling ({', '.join(steps)}), which is not computed here"
        return [
            ServingFindings(role=role, degree=degree, engine=plan.engine, uncompared=reason)
            for role in plan.models
            for degree in plan.degrees
        ]
    return serve_heads(
        plan,
        models=models.roots,
        task=task,
        texts=_served_texts(models.measurement),
        expected=outputs,
        logs=logs,
        observe=observe,
    )


def _served_texts(measurement: Measurement) -> Sequence[Sequence[int]]:
    return measurement.windows[: SERVED_WINDOWS if measurement.task.kind == "token" else SERVED_TEXTS]


def _outputs_of(measurement: Measurement) -> int:
    """Return the number of outputs of a text."""
    return len(measurement.windows[0]) if measurement.task.kind == "token" else 1


def _with_scores(findings: Findings, plan: TaskPlan, models: OpenedModels, logs: Path, observe: Observe) -> Findings:
    """Run benchmark tasks; if they cannot be run, the reason is a finding too."""
    spec = {
        "models": {role: str(models.roots[role]) for role in (MERGED, QUANTIZED)},
        "tasks": list(plan.tasks),
        "include": str(plan.include) if plan.include else None,
        "limit": plan.limit,
        "device": models.measurement.device,
    }
    try:
        worker = run_worker(
            plan.python, RUN_TASKS, spec, log=logs / "lm-eval.log", env=MEASURING_ENVIRONMENT, observe=observe
        )
    except PipelineError as error:
        return replace(findings, tasks_fault=str(error))
    return replace(findings, tasks=scores(load_results(worker.value)))
