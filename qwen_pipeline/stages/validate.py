"""``quantized -> validated``: what a quantized checkpoint is worth, measured against the model it was made from."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.digest import checkpoint_digest
from qwen_pipeline.checkpoint.lazy import MANIFEST, Checkpoint
from qwen_pipeline.checkpoint.manifest import LOGS, Derivation, canonical_sha256, find_manifest
from qwen_pipeline.checkpoint.store.derive import Built, derive
from qwen_pipeline.checkpoint.store.destinations import Artifact, Destination
from qwen_pipeline.checkpoint.store.lineage import dump_step, steps_of
from qwen_pipeline.checkpoint.store.verify import contents_of_directory, require_intact
from qwen_pipeline.errors import CheckpointRefused, InputRefused, PipelineError
from qwen_pipeline.evaluation.checks import CHECKS, judge
from qwen_pipeline.evaluation.figures import DivergenceFigures, ModelFigures, load_figures
from qwen_pipeline.evaluation.findings import BASE, MERGED, PADDED, QUANTIZED, UNPADDED_QUANTIZED, Findings, rounded
from qwen_pipeline.evaluation.limits import DEFAULT_LIMITS, Limits
from qwen_pipeline.evaluation.measurement import MEASURE, MEASURING_ENVIRONMENT, Measurement, sharding_role
from qwen_pipeline.evaluation.origin import calibration_digest, quantized_from, require_padded, require_twin, widened
from qwen_pipeline.evaluation.report.markdown import LOSS_PLOT, method_of, own_limits
from qwen_pipeline.evaluation.samples import DEFAULT_PROMPTS, MAX_NEW_TOKENS, Completion, Sample
from qwen_pipeline.evaluation.serving.findings import ServingFindings, ServingPlan
from qwen_pipeline.evaluation.serving.serve_all import serve_all
from qwen_pipeline.evaluation.tasks.plan import RUN_TASKS as TASKS_TARGET
from qwen_pipeline.evaluation.tasks.plan import TaskPlan, load_results, scores
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
from qwen_pipeline.models.open import open_model
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.quantization.calibration.calibration_set import CalibrationSet, load_calibration
from qwen_pipeline.quantization.evidence import load_evidence
from qwen_pipeline.quantization.spec import Device, default_device
from qwen_pipeline.qwen.config import require_full_precision, stop_tokens
from qwen_pipeline.qwen.families import text_config
from qwen_pipeline.reports import dump_reports
from qwen_pipeline.text.records import encode_prompt, load_tokenizer
from qwen_pipeline.text.windows import spread, token_windows
from qwen_pipeline.workers.environments import WorkerEnvironment
from qwen_pipeline.workers.parent import run_worker

__all__ = ["CHECKS", "CODE_VERSION", "DEFAULT_PROMPTS", "STAGE", "Limits", "validate"]

STAGE = "validated"
CODE_VERSION = "11"
INPUTS = {BASE: "base", MERGED: "reference", PADDED: "padded", QUANTIZED: "candidate", UNPADDED_QUANTIZED: "unpadded"}
"""Role -> its name in the derivation."""
ENGINE = "gptqmodel"
"""What Transformers loads GPTQ checkpoints with, whichever engine made them."""


def validate(
    *,
    reference: Path,
    candidate: Path,
    text: Path,
    destination: Destination | Path,
    engine: Path,
    base: Path | None = None,
    padded: Path | None = None,
    unpadded: Path | None = None,
    calibration: Path | None = None,
    before: Path | None = None,
    tensor_parallel: int = 1,
    targets: Sequence[Target] = (),
    limits: Limits = DEFAULT_LIMITS,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    windows: int = 8,
    seq_len: int = 512,
    serving: ServingPlan | None = None,
    tasks: TaskPlan | None = None,
    device: Device | None = None,
    observe: Observe = unobserved,
) -> Artifact:
    """Check and measure a quantized checkpoint, and write a report with the verdict.

    Whatever fails, the directory is finished: the reports say what, and the caller decides.

    Args:
        reference: The merged full-precision checkpoint, stored or a recipe.
        candidate: The quantized checkpoint.
        text: Held-out text, ``.txt`` or JSONL of ``text`` or ``messages``.
        destination: Where the report goes.
        engine: The python of an environment in which Transformers can load the candidate.
        base: The checkpoint that was fine-tuned, to tell what fine-tuning did.
        padded: The padded checkpoint, if the candidate is wider than the reference. Without it a foreign candidate is
            held against the reference with zeros woven in, and what padding does to predictions is not measured. What
            a repair added is known from the candidate's manifest.
        unpadded: The reference, quantized as the candidate was but without padding, to tell what padding cost.
        calibration: What the stage ``calibration`` made and the candidate was quantized on: activations are looked at
            on as many windows of it too. Without it on held-out text only.
        before: The version before the candidate, quantized, whose losses are drawn beside its own.
        tensor_parallel: Ranks that are to serve the candidate.
        targets: Engines and ranks that are to serve it; by default any engine that does nothing but share it evenly
            among ``tensor_parallel`` ranks.
        limits: The thresholds of the checks.
        prompts: What merged and quantized model answer side by side.
        windows: Windows of text, at most.
        seq_len: Tokens of a window.
        tasks: Which benchmark tasks to run, and what is asked of their scores; by default none.
        serving: Which of the checkpoints to serve with a real engine, and how; by default none.
        device: Where predictions are computed; by default a GPU where there is one.
        observe: Told about each window and module.

    Raises:
        InputRefused: A checkpoint cannot be read, the reference is quantized, or the text is too short.
        CheckpointRefused: The candidate's files are not those of its manifest.
        EnvironmentFault: The engine's environment cannot load GPTQ checkpoints, or memory ran out.
    """
    roots = {BASE: base, MERGED: reference, PADDED: padded, QUANTIZED: candidate, UNPADDED_QUANTIZED: unpadded}
    models = {role: root.resolve() for role, root in roots.items() if root}
    device = device or default_device()
    checkpoints = {role: open_model(root) for role, root in models.items()}
    require_full_precision(
        checkpoints[MERGED],
        because="The reference says what the model was before quantization.",
        remedy="Name the merged full-precision checkpoint as the reference.",
    )
    tokenizer = load_tokenizer(reference)
    tokens = token_windows(text, tokenizer, windows=windows, seq_len=seq_len)
    _require_vocabulary(checkpoints, tokens)
    require_padded(checkpoints[MERGED], checkpoints.get(PADDED), checkpoints[QUANTIZED], candidate)
    digests = {INPUTS[role]: checkpoint_digest(root, observe=observe) for role, root in models.items()}
    if unpadded:
        twins = (checkpoints[role] for role in (UNPADDED_QUANTIZED, MERGED, QUANTIZED))
        require_twin(*twins, root=unpadded, merged_digest=digests["reference"], candidate=candidate)
    heard = _quantized_on(calibration, candidate) if calibration else None
    if heard:
        digests["calibration"] = heard.digest
    earlier = load_evidence(before) if before else []
    if before:
        digests["before"] = checkpoint_digest(before, observe=observe)
    derivation = Derivation(
        stage=STAGE,
        inputs={**digests, "text": f"sha256:{canonical_sha256(tokens)}"},
        spec={
            "limits": asdict(limits),
            "device": device,
            "prompts": list(prompts),
            "serving": serving.to_json() if serving else None,
            "tasks": tasks.to_json() if tasks else None,
            "seq_len": seq_len,
            "targets": [str(target) for target in targets],
            "tensor_parallel": tensor_parallel,
            "windows": windows,
            "versions": WorkerEnvironment(name=ENGINE, python=engine).versions(),
        },
        code_version=CODE_VERSION,
    )
    measurement = Measurement(
        models={role: str(root) for role, root in models.items()},
        reference=MERGED,
        compared=[PADDED, QUANTIZED, UNPADDED_QUANTIZED],
        answering=[MERGED, QUANTIZED],
        windows=tokens,
        prompts=[encode_prompt(prompt, tokenizer) for prompt in prompts],
        max_new_tokens=MAX_NEW_TOKENS,
        device=device,
        calibration=spread(heard.stream, windows=windows, seq_len=seq_len) if heard else (),
    )

    def build(partial: Path) -> Built:
        from qwen_pipeline.evaluation.report.write import write_report
        from qwen_pipeline.evaluation.structure.check import check_structure
        from qwen_pipeline.quantization.plot import draw_losses

        if (candidate / MANIFEST).is_file():
            require_intact(candidate)
        (partial / LOGS).mkdir(exist_ok=True)
        source = quantized_from(checkpoints[MERGED], checkpoints.get(PADDED), checkpoints[QUANTIZED], candidate)
        structure = check_structure(source, checkpoints[QUANTIZED], observe=observe)
        asked = targets or [Target(engine=ANY_ENGINE, degree=tensor_parallel)]
        served = _targets(source, checkpoints[QUANTIZED], asked, observe)
        cuts = shardings_with_effect(checkpoints[QUANTIZED], served)
        worker = run_worker(
            engine,
            MEASURE,
            replace(measurement, cuts=list(cuts.values())).to_json(),
            log=partial / LOGS / "validate.log",
            env=MEASURING_ENVIRONMENT,
            observe=observe,
        )
        figures = load_figures(worker.value)
        findings = Findings(
            structure=structure,
            models={role: figures[role] for role in models},
            nbytes={role: checkpoint.nbytes for role, checkpoint in checkpoints.items()},
            samples=_samples(prompts, figures, checkpoints, tokenizer),
            parallel=assess_targets(checkpoints[QUANTIZED].config, tensor_parallel, targets),
            targets=with_divergences(served, _divergences(cuts, figures)),
        )
        if serving:
            answered = _served(serving, models, measurement, figures, tokenizer, logs=partial / LOGS, observe=observe)
            findings = replace(findings, served=answered)
        if tasks and not any(figures[role].fault for role in (MERGED, QUANTIZED)):
            findings = _with_scores(findings, tasks, models, measurement, partial / LOGS, observe)
        reports = judge(findings, limits, tasks)
        lineage = [dump_step(step) for step in steps_of(*(models[role] for role in (MERGED, PADDED) if role in models))]
        result = {
            "checks": rounded(dump_reports(reports)),
            "findings": findings.to_json(),
            "lineage": lineage,
            "padding": widened(checkpoints[MERGED].config, checkpoints[QUANTIZED].config),
            "candidate": derivation.inputs["candidate"],
            "text": derivation.inputs["text"],
        }
        losses = draw_losses(candidate, earlier, partial / LOSS_PLOT)
        steps = [*lineage, *(dump_step(step) for step in steps_of(candidate))]
        write_report(
            partial,
            findings,
            reports,
            result,
            lineage=steps,
            method=method_of(len(tokens), seq_len) + own_limits(limits),
            more_plots={losses: LOSS_PLOT} if losses else {},
        )
        return Built(contents=contents_of_directory(partial), result=result, worker_peak_bytes=worker.peak_memory_bytes)

    return derive(derivation, destination, build)


def _targets(
    source: Checkpoint, candidate: Checkpoint, targets: Sequence[Target], observe: Observe
) -> list[TargetFindings]:
    """Return what targets make of the candidate; nothing if its config does not describe codes, as structure says."""
    try:
        return find_targets(source, candidate, targets, observe=observe)
    except CheckpointRefused:
        return []


def _divergences(
    cuts: Mapping[Sharding, ShardedModules], figures: Mapping[str, ModelFigures]
) -> dict[Sharding, DivergenceFigures | None]:
    heard = [figures.get(sharding_role(number)) for number in range(len(cuts))]
    return {cut: found.divergence if found else None for cut, found in zip(cuts, heard, strict=True)}


def _quantized_on(calibration: Path, candidate: Path) -> CalibrationSet:
    """Return the tokens that the candidate was quantized on, which its manifest names."""
    found = load_calibration(calibration)
    manifest = find_manifest(candidate)
    if manifest and calibration_digest(manifest) not in (None, found.digest):
        raise InputRefused(
            f"{candidate} was not quantized on the tokens of {calibration}.",
            remedy="Name the calibration that its manifest names, or quantize again.",
        )
    return found


def _require_vocabulary(checkpoints: Mapping[str, Checkpoint], tokens: Sequence[Sequence[int]]) -> None:
    highest = max(max(window) for window in tokens)
    for role, checkpoint in checkpoints.items():
        if highest >= (size := int(text_config(checkpoint.config)["vocab_size"])):
            raise InputRefused(
                f"The text has token {highest}, but the {role} model's vocabulary has {size}.",
                remedy="Use checkpoints of one model, or text without the tokens that fine-tuning added.",
            )


def _samples(
    prompts: Sequence[str],
    figures: Mapping[str, ModelFigures],
    checkpoints: Mapping[str, Checkpoint],
    tokenizer: Any,
) -> list[Sample]:
    answers = {
        role: _answers(figures[role], stop_tokens(checkpoints[role]), tokenizer)
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


def _answers(figures: ModelFigures, stops: Collection[int], tokenizer: Any) -> list[Completion]:
    texts = tokenizer.batch_decode([list(tokens) for tokens in figures.answers], skip_special_tokens=True)
    return [
        Completion(text=text, tokens=tokens, ended=tokens[-1] in stops)
        for text, tokens in zip(texts, figures.answers, strict=True)
    ]


def _served(
    plan: ServingPlan,
    models: Mapping[str, Path],
    measured: Measurement,
    figures: Mapping[str, ModelFigures],
    tokenizer: Any,
    *,
    logs: Path,
    observe: Observe,
) -> list[ServingFindings]:
    """Serve checkpoints; a padded one has to answer as the merged one, whose function it computes."""
    return serve_all(
        plan,
        models=models,
        prompts=measured.prompts,
        expected={role: figures[MERGED if role == PADDED else role].answers for role in models if role != BASE},
        decode=lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=True),
        logs=logs,
        observe=observe,
    )


def _with_scores(
    findings: Findings,
    plan: TaskPlan,
    models: Mapping[str, Path],
    measured: Measurement,
    logs: Path,
    observe: Observe,
) -> Findings:
    """Run benchmark tasks; why they cannot be run is a finding too."""
    spec = {
        "models": {role: str(models[role]) for role in (MERGED, QUANTIZED)},
        "tasks": list(plan.tasks),
        "include": str(plan.include) if plan.include else None,
        "limit": plan.limit,
        "device": measured.device,
    }
    try:
        worker = run_worker(
            plan.python, TASKS_TARGET, spec, log=logs / "lm-eval.log", env=MEASURING_ENVIRONMENT, observe=observe
        )
    except PipelineError as error:
        return replace(findings, tasks_fault=str(error))
    return replace(findings, tasks=scores(load_results(worker.value)))
