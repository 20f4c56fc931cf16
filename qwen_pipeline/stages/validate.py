"""``quantized -> validated``: measurements of a quantized checkpoint against the model it was made from."""

from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.digest_cache import checkpoint_digest
from qwen_pipeline.checkpoint.lazy import MANIFEST, Checkpoint
from qwen_pipeline.checkpoint.manifest import Derivation, find_manifest
from qwen_pipeline.checkpoint.store.canonical import BEFORE, LOGS, canonical_sha256
from qwen_pipeline.checkpoint.store.derive import Built, derive
from qwen_pipeline.checkpoint.store.destinations import Artifact, Destination, as_destination
from qwen_pipeline.checkpoint.store.lineage import dump_step, steps_of
from qwen_pipeline.checkpoint.store.verify import contents_of_directory, require_intact
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.behaviour.ask import Asking, Requests
from qwen_pipeline.evaluation.checks import CHECKS, judge
from qwen_pipeline.evaluation.findings import (
    MERGED,
    MERGED_OTHERWISE,
    PADDED,
    QUANTIZED,
    UNPADDED_QUANTIZED,
    Findings,
    rounded,
)
from qwen_pipeline.evaluation.gather import OpenedModels, gather_findings
from qwen_pipeline.evaluation.heads import task_of, texts_of
from qwen_pipeline.evaluation.limits import Limits
from qwen_pipeline.evaluation.measurement import MEASURE, MEASURING_ENVIRONMENT, Measurement
from qwen_pipeline.evaluation.origin import (
    calibration_digest,
    equal_by_digest,
    require_other_merge,
    require_padded,
    require_unpadded_baseline,
    widened,
)
from qwen_pipeline.evaluation.plan import DEFAULT_PLAN, INPUT_OF_ROLE, ValidationInputs, ValidationPlan
from qwen_pipeline.evaluation.report.load import load_validation
from qwen_pipeline.evaluation.report.markdown import (
    LOSS_PLOT,
    STEPS_PLOT,
    changed_limits,
    method_of,
    proof_of,
    rounded_inputs,
    skipped_records,
    ways_of_merging,
)
from qwen_pipeline.evaluation.samples import DEFAULT_PROMPTS, MAX_NEW_TOKENS
from qwen_pipeline.models.open import open_model
from qwen_pipeline.progress import Observe, Progress, unobserved
from qwen_pipeline.quantization.calibration.calibration_set import CalibrationSet, load_calibration
from qwen_pipeline.quantization.evidence import ModuleEvidence, load_evidence
from qwen_pipeline.quantization.spec import default_device
from qwen_pipeline.qwen.config import require_full_precision
from qwen_pipeline.qwen.families import text_config
from qwen_pipeline.qwen.settle import require_settled
from qwen_pipeline.reports import CheckReport, dump_reports
from qwen_pipeline.text.bounded_tokenizer import BoundedTokenizer
from qwen_pipeline.text.reading import RecordUse
from qwen_pipeline.text.windows import read_windows, spread
from qwen_pipeline.transforms.codes.fp8 import is_fp8
from qwen_pipeline.workers.environments import MAIN, WorkerEnvironment
from qwen_pipeline.workers.parent import Worker, started_worker

__all__ = [
    "CHECKS",
    "CODE_VERSION",
    "DEFAULT_PROMPTS",
    "STAGE",
    "Limits",
    "ValidationInputs",
    "ValidationPlan",
    "validate",
]

STAGE = "validated"
CODE_VERSION = "16"
REPORT = "write report"
"""Name of the progress of drawing and writing."""
ENGINE = "gptqmodel"
"""The library with which Transformers loads GPTQ checkpoints, whichever quantizer made them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """Inputs that were opened and that belong together.

    Attributes:
        digests: Name of an input in the derivation -> digest.
        evidence_before: Evidence of the previous version; empty if none is given.
        records: The records of the held-out text, and those among them that could not be used.
    """

    inputs: ValidationInputs
    models: OpenedModels
    digests: Mapping[str, str]
    evidence_before: Sequence[ModuleEvidence]
    records: RecordUse


def validate(
    inputs: ValidationInputs,
    *,
    plan: ValidationPlan = DEFAULT_PLAN,
    destination: Destination | Path,
    engine: WorkerEnvironment,
    observe: Observe = unobserved,
) -> Artifact:
    """Check and measure a quantized checkpoint, and write a report with the verdict.

    The directory is finished even if checks fail: its reports say which, and the caller decides what follows.

    Args:
        inputs: The checkpoints and the text.
        plan: The measurements and the limits.
        destination: The output directory.
        engine: An environment in which Transformers can load the candidate.
        observe: Called for each window and module.

    Raises:
        InputRefused: A checkpoint cannot be read, the reference is quantized, or the text is too short.
        CheckpointRefused: The candidate's files differ from its manifest, or a finished validation was edited.
        EnvironmentFault: The engine's environment cannot load GPTQ checkpoints, or memory ran out.
    """
    plan = replace(plan, device=plan.device or default_device())
    with ExitStack() as workers:

        def start() -> Worker:
            return workers.enter_context(started_worker(engine.python, MEASURE, env=MEASURING_ENVIRONMENT))

        early = start() if engine.python.exists() and not as_destination(destination).may_hold(STAGE) else None
        prepared = _prepare(inputs, plan, observe)
        derivation = Derivation(
            stage=STAGE,
            inputs=prepared.digests,
            spec={**plan.to_json(), "versions": _loader(engine, prepared).versions()},
            code_version=CODE_VERSION,
        )
        artifact = derive(derivation, destination, lambda out: _build(out, prepared, plan, early or start(), observe))
    if artifact.reused:
        load_validation(artifact.path, artifact.manifest)
    return artifact


def _build(partial: Path, prepared: _Prepared, plan: ValidationPlan, worker: Worker, observe: Observe) -> Built:
    """Measure, judge, and write the report."""
    logs = partial / LOGS
    logs.mkdir(exist_ok=True)
    with _verifying(prepared.inputs.candidate, observe) as observed:
        findings, peak_bytes = gather_findings(prepared.models, plan, worker=worker, logs=logs, observe=observed)
    reports = judge(findings, plan.limits, plan.tasks)
    observe(Progress(task=REPORT, done=0, total=1, unit="steps"))
    result = _write(partial, prepared, plan, findings, reports)
    observe(Progress(task=REPORT, done=1, total=1, unit="steps"))
    return Built(contents=contents_of_directory(partial), result=result, worker_peak_bytes=peak_bytes)


def _loader(engine: WorkerEnvironment, prepared: _Prepared) -> WorkerEnvironment:
    """Return the environment by the library with which Transformers loads the candidate."""
    settings = prepared.models.checkpoints[QUANTIZED].config.get("quantization_config") or {}
    return replace(engine, name=MAIN if is_fp8(settings) else ENGINE)


@contextmanager
def _verifying(candidate: Path, observe: Observe) -> Generator[Observe]:
    """Compare a finished directory's files with its manifest during the body; yield an observer for the body.

    It raises the error as soon as a difference is known, and an error of the body is raised only if there is none.
    """
    if not (candidate / MANIFEST).is_file():
        yield observe
        return
    with ThreadPoolExecutor(1) as pool:
        verified = pool.submit(require_intact, candidate)

        def observed(progress: Progress) -> None:
            if verified.done():
                verified.result()
            observe(progress)

        try:
            yield observed
        except Exception:
            verified.result()
            raise
        verified.result()


def _prepare(inputs: ValidationInputs, plan: ValidationPlan, observe: Observe) -> _Prepared:
    """Open the inputs, and refuse those that do not belong together before anything is computed."""
    roots = inputs.models
    checkpoints = {role: open_model(root) for role, root in roots.items()}
    require_full_precision(
        checkpoints[MERGED],
        because="The reference is the model before quantization.",
        remedy="Pass the merged full-precision checkpoint as the reference.",
    )
    require_settled(checkpoints[MERGED])
    tokenizer = BoundedTokenizer(inputs.reference, plan.text_spec.limits)
    task = task_of(checkpoints[MERGED])
    windows, records = read_windows(
        inputs.text, tokenizer, windows=plan.windows, seq_len=plan.seq_len, spec=plan.text_spec
    )
    tokens = texts_of(windows, tokenizer, task)
    _require_vocabulary(checkpoints, tokens)
    require_padded(checkpoints[MERGED], checkpoints.get(PADDED), checkpoints[QUANTIZED], inputs.candidate)
    digests = {INPUT_OF_ROLE[role]: checkpoint_digest(root, observe=observe) for role, root in roots.items()}
    if inputs.other_merge:
        require_other_merge(inputs.other_merge, inputs.reference)
    if inputs.unpadded:
        trio = (checkpoints[role] for role in (UNPADDED_QUANTIZED, MERGED, QUANTIZED))
        require_unpadded_baseline(
            *trio, root=inputs.unpadded, merged_digest=digests["reference"], candidate=inputs.candidate
        )
    calibration = _load_calibration(inputs.calibration, inputs.candidate) if inputs.calibration else None
    if calibration:
        digests["calibration"] = calibration.digest
    evidence_before = load_evidence(inputs.before) if inputs.before else []
    if inputs.before:
        digests[BEFORE] = checkpoint_digest(inputs.before, observe=observe)
    digests["text"] = f"sha256:{canonical_sha256(tokens)}"
    requests = _requests(checkpoints[MERGED], tokenizer, plan, tokens) if task.kind == "language" else Requests()
    measurement = Measurement(
        models={role: str(root) for role, root in roots.items()},
        reference=MERGED,
        compared=[MERGED_OTHERWISE, PADDED, QUANTIZED, UNPADDED_QUANTIZED],
        answering=[MERGED, QUANTIZED] if task.kind == "language" else [],
        windows=tokens,
        prompts=[
            tokenizer.encode_prompt(prompt, arguments=plan.text_spec.template_arguments)
            for prompt in (plan.prompts if task.kind == "language" else ())
        ],
        max_new_tokens=MAX_NEW_TOKENS,
        device=plan.device or default_device(),
        calibration=spread(calibration.stream, windows=plan.windows, seq_len=plan.seq_len) if calibration else (),
        requests=[request.tokens for request in requests.asked],
        request_limits=[request.limit for request in requests.asked],
        task=task,
        equal=equal_by_digest(roots.get(PADDED, roots[MERGED]), inputs.candidate),
    )
    models = OpenedModels(
        roots=roots, checkpoints=checkpoints, tokenizer=tokenizer, measurement=measurement, requests=requests
    )
    return _Prepared(inputs=inputs, models=models, digests=digests, evidence_before=evidence_before, records=records)


def _requests(
    merged: Checkpoint, tokenizer: BoundedTokenizer, plan: ValidationPlan, windows: Sequence[Sequence[int]]
) -> Requests:
    asking = Asking(tokenizer, plan.text_spec.template_arguments)
    return asking.requests(plan.behaviour, windows, positions=text_config(merged.config).get("max_position_embeddings"))


def _write(
    root: Path, prepared: _Prepared, plan: ValidationPlan, findings: Findings, reports: Sequence[CheckReport]
) -> dict[str, Any]:
    """Write the report into ``root``; return the result for the manifest."""
    from qwen_pipeline.evaluation.report.write import write_report
    from qwen_pipeline.quantization.plot import draw_losses, draw_steps

    models, candidate = prepared.models, prepared.inputs.candidate
    lineage = [
        dump_step(step) for step in steps_of(*(models.roots[role] for role in (MERGED, PADDED) if role in models.roots))
    ]
    result = {
        "checks": rounded(dump_reports(reports)),
        "findings": findings.to_json(),
        "lineage": lineage,
        "padding": widened(models.checkpoints[MERGED].config, models.checkpoints[QUANTIZED].config),
        "candidate": prepared.digests["candidate"],
        "text": prepared.digests["text"],
        "records": prepared.records.to_json(),
    }
    drawn = {
        LOSS_PLOT: draw_losses(candidate, prepared.evidence_before, root / LOSS_PLOT),
        STEPS_PLOT: draw_steps(candidate, root / STEPS_PLOT),
    }
    write_report(
        root,
        findings,
        reports,
        result,
        lineage=[*lineage, *(dump_step(step) for step in steps_of(candidate))],
        method=method_of(models.measurement)
        + proof_of(models.measurement, findings.models)
        + ways_of_merging(prepared.inputs)
        + rounded_inputs(models.checkpoints[QUANTIZED].config)
        + skipped_records(prepared.records, candidate)
        + changed_limits(plan.limits),
        more_plots={caption: file for file, caption in drawn.items() if caption},
    )
    return result


def _load_calibration(calibration: Path, candidate: Path) -> CalibrationSet:
    """Read the tokens that the candidate was quantized on.

    Raises:
        InputRefused: The candidate's manifest names other tokens.
    """
    found = load_calibration(calibration)
    manifest = find_manifest(candidate)
    if manifest and calibration_digest(manifest) not in (None, found.digest):
        raise InputRefused(
            f"{candidate} was not quantized on the tokens of {calibration}.",
            remedy="Pass the calibration that its manifest names, or quantize again.",
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
