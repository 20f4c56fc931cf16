"""The checks of a validation, and the verdict on its findings."""

from collections.abc import Sequence

from qwen_pipeline.errors import listed
from qwen_pipeline.evaluation.behaviour.checks import BEHAVIOUR_CHECKS, behaviour_reports
from qwen_pipeline.evaluation.findings import BASE, MERGED, PADDED, QUANTIZED, Findings
from qwen_pipeline.evaluation.head_checks import (
    DRAFTS,
    HEAD_CHECKS,
    OF_LANGUAGE,
    concerning,
    drafts_report,
    head_reports,
    inapplicable,
    purpose,
    served_heads_report,
)
from qwen_pipeline.evaluation.limits import Limits
from qwen_pipeline.evaluation.logits.float16 import FLOAT16, float16_report
from qwen_pipeline.evaluation.serving.findings import SERVED, serving_report
from qwen_pipeline.evaluation.tasks.plan import TASKS, TaskPlan, tasks_report
from qwen_pipeline.evaluation.tensor_parallel.findings import ANY_ENGINE, Target, TargetFindings
from qwen_pipeline.reports import CheckReport, CheckSpec

STRUCTURE = CheckSpec(
    name="structure",
    description="Every expected tensor is present with the right shape and dtype, and there are no others; scales are"
    " finite and not zero; every group of codes decodes to its original weights; config, tokenizer, chat"
    " template and generation config agree; tensors that were not quantized are unchanged.",
)
LOADS = CheckSpec(
    name="loads_in_transformers",
    description="Transformers loads every model with no tensor missing, unexpected, of another shape or randomly"
    " initialized.",
)
PADDING = CheckSpec(
    name="padding_is_silent",
    description="Padding changes no prediction; after quantization the zeros that it added are still exactly zero, and"
    " the gate and up rows of split channels are still equal.",
)
PERPLEXITY = CheckSpec(
    name="perplexity_ratio",
    description="The perplexity ratio on held-out text, quantized over merged, does not exceed the limit.",
)
KL = CheckSpec(
    name="kl_divergence", description="Mean KL(merged || quantized) on held-out text does not exceed the limit."
)
AGREEMENT = CheckSpec(
    name="top1_agreement",
    description="The merged and the quantized model agree on the most likely next token often enough.",
)
PARALLEL = CheckSpec(
    name="tensor_parallel",
    description="Every rank at the requested tensor-parallel degree holds whole groups and heads.",
)
RANKS = CheckSpec(
    name="ranks_agree",
    description="No engine among the targets refuses the checkpoint, and its ranks, simulated one by one, compute with"
    " the weights of the unsharded model.",
)
MERGED_NOT_WORSE = CheckSpec(
    name="merged_not_worse",
    description="Fine-tuning did not degrade the base: the perplexity ratio, merged over base, does not exceed the"
    " limit.",
    blocking=False,
)
SAMPLES = CheckSpec(
    name="sample_texts",
    description="The merged and the quantized model answer; no answer of the latter is empty, repetitive or overlong"
    " where the merged model's is not.",
    blocking=False,
)
CHECKS = (
    STRUCTURE, LOADS, PADDING, PERPLEXITY, KL, AGREEMENT, DRAFTS, *HEAD_CHECKS, PARALLEL, RANKS, FLOAT16,
    MERGED_NOT_WORSE, *BEHAVIOUR_CHECKS, SAMPLES, SERVED, TASKS,
)  # fmt: skip


def judge(findings: Findings, limits: Limits, tasks: TaskPlan | None = None) -> list[CheckReport]:
    """Return a report for each of :data:`CHECKS`, in order; ``tasks`` has the limits of the scores."""
    reports = [
        _structure(findings),
        _loading(findings),
        _padding(findings, limits),
        _perplexity(findings, limits),
        _kl(findings, limits),
        _agreement(findings, limits),
        drafts_report(findings, limits),
        *head_reports(findings, limits),
        _parallel(findings),
        _ranks(findings),
        _float16(findings, limits),
        _merged_not_worse(findings, limits),
        *behaviour_reports(findings.behaviour, findings.samples, findings.models[QUANTIZED].divergence, limits),
        _samples(findings),
        _served(findings, limits),
        tasks_report(tasks, findings.tasks, fault=findings.tasks_fault),
    ]
    skipped, reason = OF_LANGUAGE & inapplicable(findings.task), f"Not for {purpose(findings.task)}."
    return [
        spec.skipped(reason) if spec.name in skipped else report for spec, report in zip(CHECKS, reports, strict=True)
    ]


def _served(findings: Findings, limits: Limits) -> CheckReport:
    if findings.task.kind == "language":
        return serving_report(findings.served, max_gap=limits.max_served_gap)
    return served_heads_report(findings.served, findings.task, limits)


def _structure(findings: Findings) -> CheckReport:
    problems = findings.structure.problems
    return STRUCTURE.report(
        passed=not problems,
        measured=len(problems),
        limit=0,
        detail=listed(problems) if problems else f"All {len(findings.structure.errors)} quantized weights are valid.",
    )


def _loading(findings: Findings) -> CheckReport:
    faults = [f"{role}: {model.fault}" for role, model in findings.models.items() if model.fault]
    unplaced = [f"{role}: {model.unplaced}" for role, model in findings.models.items() if model.unplaced]
    advice = (
        "Transformers supports neither packed experts, which it would initialize randomly, nor codes of several widths:"
        " serve the checkpoint with an engine that supports them."
    )
    return LOADS.report(
        passed=not (faults or unplaced),
        measured=len(faults) + len(unplaced),
        limit=0,
        detail=listed(faults)
        if faults
        else f"{advice} {listed(unplaced)}"
        if unplaced
        else f"{', '.join(findings.models)}: every tensor was loaded.",
        severity="ERROR" if faults else "WARN",
    )


def _padding(findings: Findings, limits: Limits) -> CheckReport:
    padding, measured = findings.structure.padding, None
    is_language = findings.task.kind == "language"
    limit = limits.max_padding_kl if is_language else limits.max_padding_error
    unit = "mean KL(merged || padded) in nats per token" if is_language else "relative difference of outputs"
    problems = list(padding.audible)
    if PADDED in findings.models:
        padded = findings.models[PADDED]
        measured = padded.divergence.mean if padded.divergence else padded.head.error if padded.head else None
        if measured is None:
            return _unmeasured(PADDING, limit, findings, PADDED)
        if not measured <= limit:
            problems.append("padding alone changes predictions")
    elif not (problems or padding.channels or padding.twins):
        return PADDING.skipped("No padded checkpoint was given, and the model has no padded channels.")
    return PADDING.report(
        passed=not problems,
        measured=measured,
        limit=None if measured is None else limit,
        detail=f"{listed(problems)}. Pad and quantize again."
        if problems
        else f"All {padding.channels} added channels are still zero; all {padding.twins} split ones have equal rows."
        + ("" if measured is None else f" The measured value is the {unit}."),
    )


def _perplexity(findings: Findings, limits: Limits) -> CheckReport:
    ratio = findings.perplexity_ratio(QUANTIZED, to=MERGED)
    if ratio is None:
        return _unmeasured(PERPLEXITY, limits.max_perplexity_ratio, findings, MERGED, QUANTIZED)
    return PERPLEXITY.report(
        passed=ratio <= limits.max_perplexity_ratio,
        measured=ratio,
        limit=limits.max_perplexity_ratio,
        detail=_perplexities(findings, QUANTIZED, MERGED) + _advice(ratio <= limits.max_perplexity_ratio),
    )


def _kl(findings: Findings, limits: Limits) -> CheckReport:
    divergence = findings.models[QUANTIZED].divergence
    if divergence is None:
        return _unmeasured(KL, limits.max_mean_kl, findings, MERGED, QUANTIZED)
    passed = divergence.mean <= limits.max_mean_kl
    return KL.report(
        passed=passed,
        measured=divergence.mean,
        limit=limits.max_mean_kl,
        detail=f"In nats per token; the 95th percentile is {divergence.p95:.3g}, the maximum {divergence.max:.3g}."
        + _advice(passed),
    )


def _agreement(findings: Findings, limits: Limits) -> CheckReport:
    divergence = findings.models[QUANTIZED].divergence
    if divergence is None:
        return _unmeasured(AGREEMENT, limits.min_top1_agreement, findings, MERGED, QUANTIZED)
    passed = divergence.top1_agreement >= limits.min_top1_agreement
    return AGREEMENT.report(
        passed=passed,
        measured=divergence.top1_agreement,
        limit=limits.min_top1_agreement,
        detail="Share of tokens for which both models predict the same most likely token." + _advice(passed),
    )


def _parallel(findings: Findings) -> CheckReport:
    feasibility = findings.parallel
    if feasibility is None:
        return PARALLEL.report(passed=False, detail="Unknown: the config does not define the group size of the codes.")
    return PARALLEL.report(
        passed=feasibility.whole and feasibility.legal,
        measured=feasibility.degree,
        detail=f"At degree {feasibility.degree}: {feasibility.sentence}",
        severity="WARN" if feasibility.whole else "ERROR",
    )


def _ranks(findings: Findings) -> CheckReport:
    if not findings.targets:
        return RANKS.report(passed=False, detail="Unknown: the config does not define the group size of the codes.")
    kernels: dict[Target, list[TargetFindings]] = {}
    for row in findings.targets:
        kernels.setdefault(row.target, []).append(row)
    wrong = {target: faults for target, rows in kernels.items() if (faults := _target_faults(rows))}
    declared = any(target.engine != ANY_ENGINE for target in kernels)
    heads_only = not declared and not any(row.answers_wrongly for row in findings.targets)
    return RANKS.report(
        passed=not wrong,
        measured=len(wrong),
        limit=0,
        detail=f"{listed([fault for faults in wrong.values() for fault in faults])}. {_remedy(findings.targets)}"
        if wrong
        else f"{', '.join(map(str, kernels))}: every rank computes with the unsharded weights, bit for bit.",
        severity="WARN" if heads_only else "ERROR",
    )


def _remedy(rows: "Sequence[TargetFindings]") -> str:
    if any(row.is_of_floats for row in rows):
        return "Pad for these ranks before quantization, or use the method fp8-dynamic, which has no blocks."
    return "Pad for these ranks before quantization, use smaller groups, or repair the checkpoint."


def _target_faults(rows: "Sequence[TargetFindings]") -> list[str]:
    """Return the faults of a target: no kernel of it may give wrong answers, and at least one must serve."""
    if wrong := [row.sentence for row in rows if row.answers_wrongly]:
        return wrong
    return [row.sentence for row in rows] if all(row.refuses for row in rows) else []


def _float16(findings: Findings, limits: Limits) -> CheckReport:
    quantized = findings.models[QUANTIZED]
    if not (quantized.peaks or quantized.calibration_peaks):
        return _unmeasured(FLOAT16, limits.max_activation, findings, MERGED, QUANTIZED)
    return float16_report(quantized, max_activation=limits.max_activation)


def _merged_not_worse(findings: Findings, limits: Limits) -> CheckReport:
    if BASE not in findings.models:
        return MERGED_NOT_WORSE.skipped("No base was given to compare the merged model with.")
    ratio = findings.perplexity_ratio(MERGED, to=BASE)
    if ratio is None:
        return _unmeasured(MERGED_NOT_WORSE, limits.max_merged_ratio, findings, BASE, MERGED)
    passed = ratio <= limits.max_merged_ratio
    return MERGED_NOT_WORSE.report(
        passed=passed,
        measured=ratio,
        limit=limits.max_merged_ratio,
        detail=_perplexities(findings, MERGED, BASE)
        + ("" if passed else " Train for fewer steps or with a smaller learning rate, or use text of the domain."),
    )


def _samples(findings: Findings) -> CheckReport:
    unanswered = [f"{role}: {model.unanswered}" for role, model in findings.models.items() if model.unanswered]
    broken = [f"the answer to {sample.prompt!r} {sample.fault}" for sample in findings.samples if sample.fault]
    faults = [*(f"no answers from {fault}" for fault in unanswered), *broken]
    if not faults and not any(sample.candidate for sample in findings.samples):
        return SAMPLES.skipped("The quantized model has no answers: no prompts are configured, or it did not load.")
    agreed = ", ".join(f"{sample.agreed_tokens} of {sample.tokens}" for sample in findings.samples)
    ignored = sorted({setting for model in findings.models.values() for setting in model.unapplied})
    note = f" Settings of the generation config that were not applied: {', '.join(ignored)}." if ignored else ""
    return SAMPLES.report(
        passed=not faults,
        measured=len(faults),
        limit=0,
        detail=(
            f"{listed(faults)}. See the answers in the report."
            if faults
            else f"Equal tokens at the start of both answers: {agreed or 'none'}. See the answers in the report."
        )
        + note,
    )


def _perplexities(findings: Findings, first: str, second: str) -> str:
    values = (f"{findings.perplexity(role):.4g} ({role})" for role in (first, second))
    return f"The perplexity is {' and '.join(values)}."


def _advice(passed: bool) -> str:
    return "" if passed else " Use more calibration text, smaller groups or 8 bits."


def _unmeasured(check: CheckSpec, limit: float, findings: Findings, *roles: str) -> CheckReport:
    absent = [role for role in roles if findings.models[role].fault]
    return check.report(
        passed=False,
        limit=limit,
        detail=f"Not measured, because these models did not load: {', '.join(absent or [MERGED])}.",
    )


def verdict(reports: Sequence[CheckReport]) -> str:
    """Return the outcome of the checks in one line; only checks that ran count as passed."""
    reports = concerning(reports)
    failed, warned, skipped = (
        ", ".join(report.name for report in reports if report.outcome == outcome)
        for outcome in ("failed", "warning", "skipped")
    )
    ran = [report for report in reports if not report.skipped]
    passed = f"passed: {sum(report.passed for report in ran)} of {len(ran)} checks that ran"
    return (
        (f"failed: {failed}" if failed else passed)
        + (f", with warnings: {warned}" if warned else "")
        + (f"; skipped: {skipped}" if skipped else "")
    )
