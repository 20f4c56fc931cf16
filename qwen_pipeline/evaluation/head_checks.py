"""The checks of classifiers, reward models, embedding models and draft heads, beside those of language models."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qwen_pipeline.evaluation.behaviour.checks import BEHAVIOUR_CHECKS
from qwen_pipeline.evaluation.figures import HeadFigures
from qwen_pipeline.evaluation.findings import BASE, MERGED, QUANTIZED, Findings
from qwen_pipeline.evaluation.heads import HeadTask
from qwen_pipeline.evaluation.limits import Limits
from qwen_pipeline.evaluation.serving.findings import ServingFindings, report_on_servers
from qwen_pipeline.reports import CheckReport, CheckSpec

LOGITS = CheckSpec(
    name="head_logits",
    description="On held-out text, the logits of the quantized classifier or reward model are close to the merged"
    " model's.",
)
LABELS = CheckSpec(
    name="label_agreement",
    description="The merged and the quantized classifier agree on the most likely label often enough.",
)
ORDER = CheckSpec(
    name="reward_order",
    description="The merged and the quantized reward model order pairs of texts alike often enough.",
)
COSINE = CheckSpec(
    name="embedding_cosine", description="The merged and the quantized model embed texts in almost the same direction."
)
DRAFTS = CheckSpec(
    name="draft_acceptance",
    description="On held-out text, the quantized model accepts enough of its draft head's drafts.",
    blocking=False,
)
HEAD_CHECKS = (LOGITS, LABELS, ORDER, COSINE)
OF_LANGUAGE = frozenset({
    "perplexity_ratio", "kl_divergence", "top1_agreement", "draft_acceptance", "merged_not_worse", "sample_texts",
    "benchmark_tasks", *(check.name for check in BEHAVIOUR_CHECKS),
})  # fmt: skip
"""The checks that only a language model has."""
MINIMUM_HEAD_CHECKS = (LABELS, ORDER, COSINE)
"""Those whose limit is a minimum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _HeadCheck:
    """The models that a check concerns, its figure and limit, and the detail of its report."""

    spec: CheckSpec
    concerns: Callable[[HeadTask], bool]
    measured: Callable[[HeadFigures], float | None]
    limit: Callable[[Limits], float]
    detail: Callable[[HeadFigures], str]

    def passes(self, measured: float, limits: Limits) -> bool:
        """Return whether a figure is within the limit; NaN never is."""
        limit = self.limit(limits)
        return measured >= limit if self.spec in MINIMUM_HEAD_CHECKS else measured <= limit


_TABLE = (
    _HeadCheck(
        spec=LOGITS,
        concerns=lambda task: task.labels > 0,
        measured=lambda found: found.error,
        limit=lambda limits: limits.max_head_error,
        detail=lambda found: (
            "Norm of the differences over that of the merged logits' deviations from their mean, of"
            f" {found.outputs} outputs; the largest difference is {found.max_error:.3g}."
        ),
    ),
    _HeadCheck(
        spec=LABELS,
        concerns=lambda task: task.labels > 1,
        measured=lambda found: found.agreement,
        limit=lambda limits: limits.min_label_agreement,
        detail=lambda found: f"Share of {found.outputs} outputs for which both give the same most likely label.",
    ),
    _HeadCheck(
        spec=ORDER,
        concerns=lambda task: task.is_reward,
        measured=lambda found: found.order,
        limit=lambda limits: limits.min_reward_order,
        detail=lambda found: f"Share of pairs of {found.outputs} outputs that both order alike.",
    ),
    _HeadCheck(
        spec=COSINE,
        concerns=lambda task: task.kind == "embedding",
        measured=lambda found: found.cosine,
        limit=lambda limits: limits.min_embedding_cosine,
        detail=lambda found: f"Mean over {found.outputs} texts; the lowest is {found.min_cosine or 0:.4g}.",
    ),
)


def head_reports(findings: Findings, limits: Limits) -> list[CheckReport]:
    """Return a report for each of :data:`HEAD_CHECKS`, in order."""
    return [_report(check, findings, limits) for check in _TABLE]


def served_heads_report(served: Sequence[ServingFindings], task: HeadTask, limits: Limits) -> CheckReport:
    """Report on the outputs that a serving engine computed, by the limits of the checks that concern the task."""
    checks = [check for check in _TABLE if check.concerns(task)]
    compared = [each.head for each in served if each.head]
    first = checks[0]
    values = [value for found in compared if (value := first.measured(found)) is not None]
    worst = min if first.spec in MINIMUM_HEAD_CHECKS else max
    return report_on_servers(
        served,
        wrong=lambda each: [fault for check in checks if (fault := _served_fault(check, each.head, limits))],
        agreement=f"{compared[0].outputs} outputs are as close to the merged model's as the limits demand"
        f" ({first.spec.name} {worst(values):.3g})"
        if values
        else "",
        measured=worst(values, default=0.0),
        limit=first.limit(limits),
    )


def _served_fault(check: _HeadCheck, found: HeadFigures | None, limits: Limits) -> str:
    measured = check.measured(found) if found else None
    if measured is None:
        return "it computed nothing"
    return "" if check.passes(measured, limits) else f"{check.spec.name} is {measured:.3g}, not {check.limit(limits):g}"


def drafts_report(findings: Findings, limits: Limits) -> CheckReport:
    """Report on :data:`DRAFTS`, beside the shares of the models that the quantized one was made from."""
    shares = {
        role: found.draft_acceptance
        for role in (BASE, MERGED, QUANTIZED)
        if (found := findings.models.get(role)) and found.draft_acceptance is not None
    }
    if QUANTIZED not in shares:
        return DRAFTS.skipped("The model has no draft head.")
    passed = shares[QUANTIZED] >= limits.min_draft_acceptance
    others = ", ".join(f"{role} {share:.1%}" for role, share in shares.items() if role != QUANTIZED)
    return DRAFTS.report(
        passed=passed,
        measured=shares[QUANTIZED],
        limit=limits.min_draft_acceptance,
        detail=f"Share of first drafts that equal the model's own next token; {others or 'no other was measured'}."
        + ("" if passed else " Serve it without speculation, or train the draft head after the fine-tune."),
    )


def inapplicable(task: HeadTask) -> frozenset[str]:
    """Return the names of the checks that do not concern models with this task."""
    others = frozenset(check.spec.name for check in _TABLE if not check.concerns(task))
    return others if task.kind == "language" else others | OF_LANGUAGE


def concerning(reports: Sequence[CheckReport]) -> list[CheckReport]:
    """Return the reports without those that were skipped because they are about another kind of model."""
    ours = {check.name for check in HEAD_CHECKS}
    is_language = all(report.skipped for report in reports if report.name in ours)
    others = ours | {DRAFTS.name} if is_language else ours | OF_LANGUAGE
    return [report for report in reports if not (report.skipped and report.name in others)]


def purpose(task: HeadTask) -> str:
    """Return the name of a kind of model, for a sentence."""
    if task.kind == "embedding":
        return f"an embedding model (pooling: {', '.join(task.pooling)})"
    if task.kind == "language":
        return "a language model"
    of = "tokens" if task.kind == "token" else "texts"
    return f"a reward model of {of}" if task.is_reward else f"a classifier of {of} with {task.labels} labels"


def _report(check: _HeadCheck, findings: Findings, limits: Limits) -> CheckReport:
    if not check.concerns(findings.task):
        return check.spec.skipped(f"This is {purpose(findings.task)}.")
    found, limit = findings.models[QUANTIZED].head, check.limit(limits)
    measured = check.measured(found) if found else None
    if found is None or measured is None:
        absent = [role for role in (MERGED, QUANTIZED) if findings.models[role].fault]
        return check.spec.report(
            passed=False,
            limit=limit,
            detail=f"Not measured, because these models did not load: {', '.join(absent or [MERGED])}.",
        )
    passed = check.passes(measured, limits)
    advice = "" if passed else " Use more calibration text, smaller groups or 8 bits."
    return check.spec.report(passed=passed, measured=measured, limit=limit, detail=check.detail(found) + advice)
