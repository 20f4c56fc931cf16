"""Gather the findings of a validation: structure, sharding, predictions, answers, serving and benchmark tasks."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import CheckpointRefused, PipelineError
from qwen_pipeline.evaluation.figures import DivergenceFigures, ModelFigures, load_figures
from qwen_pipeline.evaluation.findings import BASE, MERGED, PADDED, QUANTIZED, Findings
from qwen_pipeline.evaluation.measurement import MEASURE, MEASURING_ENVIRONMENT, Measurement, sharding_role
from qwen_pipeline.evaluation.origin import quantized_from
from qwen_pipeline.evaluation.plan import ValidationPlan
from qwen_pipeline.evaluation.samples import Completion, Sample
from qwen_pipeline.evaluation.serving.findings import ServingFindings, ServingPlan
from qwen_pipeline.evaluation.serving.serve_all import serve_all
from qwen_pipeline.evaluation.tasks.plan import RUN_TASKS, TaskPlan, load_results, scores
from qwen_pipeline.evaluation.tensor_parallel.find import (
    assess_targets,
    find_targets,
    shardings_with_effect,
    with_divergences,
)
from qwen_pipeline.evaluation.tensor_parallel.findings import (
    ANY_ENGINE,
    ShardedModules,
    Sharding,
    Target,
    TargetFindings,
)
from qwen_pipeline.progress import Observe
from qwen_pipeline.qwen.config import stop_tokens
from qwen_pipeline.workers.environments import WorkerEnvironment
from qwen_pipeline.workers.parent import run_worker


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedModels:
    """The models of a validation, opened and ready to be measured.

    Attributes:
        roots: Role -> directory.
        checkpoints: Role -> checkpoint.
        tokenizer: The reference's tokenizer.
        measurement: The measurement of the worker, without shardings.
    """

    roots: Mapping[str, Path]
    checkpoints: Mapping[str, Checkpoint]
    tokenizer: Any
    measurement: Measurement


def gather_findings(
    models: OpenedModels,
    plan: ValidationPlan,
    *,
    candidate: Path,
    engine: WorkerEnvironment,
    logs: Path,
    observe: Observe,
) -> tuple[Findings, int]:
    """Make all measurements of a plan; return the findings and the peak memory of the worker in bytes.

    Args:
        models: The opened models.
        plan: The plan.
        candidate: The directory of the quantized checkpoint, whose manifest records the groups that a repair added.
        engine: An environment in which Transformers can load the candidate.
        logs: The directory for the logs of workers and servers.
        observe: Called with the progress of each step.
    """
    from qwen_pipeline.evaluation.structure.check import check_structure

    checkpoints = models.checkpoints
    quantized = checkpoints[QUANTIZED]
    source = quantized_from(checkpoints[MERGED], checkpoints.get(PADDED), quantized, candidate)
    structure = check_structure(source, quantized, observe=observe)
    targets = plan.targets or [Target(engine=ANY_ENGINE, degree=plan.tensor_parallel)]
    found = _targets(source, quantized, targets, observe)
    shardings = shardings_with_effect(quantized, found)
    measurement = replace(models.measurement, shardings=list(shardings.values()), unruled=plan.serving is not None)
    log, is_language = logs / "validate.log", measurement.task.kind == "language"
    worker = run_worker(
        engine.python, MEASURE, measurement.to_json(), log=log, env=MEASURING_ENVIRONMENT, observe=observe
    )
    figures = load_figures(worker.value)
    findings = Findings(
        structure=structure,
        models={role: figures[role] for role in models.roots},
        nbytes={role: checkpoint.nbytes for role, checkpoint in checkpoints.items()},
        samples=_samples(plan.prompts, figures, models) if is_language else [],
        parallel=assess_targets(quantized.config, plan.tensor_parallel, plan.targets),
        targets=with_divergences(found, _divergences(shardings, figures)),
        task=measurement.task,
    )
    if plan.serving and is_language:
        findings = replace(findings, served=_serve(plan.serving, models, figures, logs, observe))
    if plan.tasks and is_language and not any(figures[role].fault for role in (MERGED, QUANTIZED)):
        findings = _with_scores(findings, plan.tasks, models, logs, observe)
    return findings, worker.peak_memory_bytes


def _targets(
    source: Checkpoint, candidate: Checkpoint, targets: Sequence[Target], observe: Observe
) -> list[TargetFindings]:
    """Return the findings for each target; none if the config describes no codes, which the structure check reports."""
    try:
        return find_targets(source, candidate, targets, observe=observe)
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


def _completions(figures: ModelFigures, stops: Collection[int], tokenizer: Any) -> list[Completion]:
    texts = tokenizer.batch_decode([list(tokens) for tokens in figures.answers], skip_special_tokens=True)
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
        decode=lambda tokens: models.tokenizer.decode(list(tokens), skip_special_tokens=True),
        logs=logs,
        observe=observe,
    )


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
