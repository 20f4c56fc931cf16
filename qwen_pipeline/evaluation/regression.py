"""Compare a validation with that of the last release of the same fine-tune."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_pipeline.checkpoint.manifest import find_manifest
from qwen_pipeline.errors import CheckpointRefused, InputRefused
from qwen_pipeline.evaluation.figures import ModelFigures
from qwen_pipeline.evaluation.findings import QUANTIZED
from qwen_pipeline.evaluation.report.load import RELEASED_JSON, REPORT_JSON, load_release, load_validation
from qwen_pipeline.reports import CheckReport, CheckSpec, shown

NOT_WORSE = CheckSpec(
    name="not_worse_than_release",
    description="On the same text, the quantized model is not worse than in the last release of this fine-tune.",
    blocking=False,
)
MAX_GROWTH = 1.02
"""Maximum ratio of the new quantized model's perplexity to that of the released one; beyond it the check warns."""
_MEAN, _TAIL = "mean KL", "KL 99.9 %"
_DECIDING = ("perplexity", "error")
"""The figures that the ratio is computed from; a model has one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationVerdict:
    """The quantized model's figures in a validation, and the digest of the text that they were measured on."""

    quantized: ModelFigures
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One figure, before and now."""

    figure: str
    before: float
    now: float


def load_verdict(root: Path) -> ValidationVerdict:
    """Read the verdict of a validation, or of a release, which contains its validation.

    Raises:
        InputRefused: The directory has no validation report.
        CheckpointRefused: The report is damaged or was edited.
    """
    manifest = find_manifest(root)
    files = manifest.contents.files if manifest else {}
    if manifest and REPORT_JSON in files:
        report = load_validation(root, manifest)
    elif manifest and RELEASED_JSON in files:
        report = load_release(root, manifest)
    else:
        raise InputRefused(
            f"{root} has no validation report.", remedy="Pass a directory that `validate` or `publish` wrote."
        )
    if QUANTIZED not in report.findings.models:
        raise CheckpointRefused(
            f"{root} is damaged: its findings have no {QUANTIZED} model.", remedy=f"Delete {root} and make it again."
        )
    return ValidationVerdict(quantized=report.findings.models[QUANTIZED], text=report.text)


def changes(before: ValidationVerdict, now: ValidationVerdict) -> list[Change]:
    """Return the figures that both verdicts have."""
    old, new = _figures(before.quantized), _figures(now.quantized)
    return [Change(figure=name, before=old[name], now=new[name]) for name in old if name in new]


def compare(released: ValidationVerdict | None, now: ValidationVerdict) -> CheckReport:
    """Report on :data:`NOT_WORSE`: the growth of perplexity since the last release.

    If the mean KL fell and its tail grew, as after a change of recipe that fits common text at the cost of rare tokens,
    the report says so, and its figure is the growth of the tail.
    """
    if released is None:
        return NOT_WORSE.skipped("There is no earlier release to compare with.")
    if released.text != now.text:
        return NOT_WORSE.skipped("The last release was measured on other held-out text, or another number of windows.")
    found = changes(released, now)
    growth = next(
        (change.now / change.before for change in found if change.figure in _DECIDING and change.before), None
    )
    if growth is None:
        return NOT_WORSE.report(passed=False, detail="Not compared: one of the two models did not load.")
    lost = _lost_tail(found)
    growth = max(growth, lost or 0)
    moved = ", ".join(f"{change.figure} {shown(change.before)} -> {shown(change.now)}" for change in found)
    return NOT_WORSE.report(
        passed=growth <= MAX_GROWTH,
        measured=growth,
        limit=MAX_GROWTH,
        detail=f"{f'Regressed by {growth - 1:.1%}' if growth > MAX_GROWTH else 'Not worse'}: {moved}."
        + (" The mean of KL fell, but its tail grew: rare tokens pay for the common ones." if lost else ""),
    )


def _lost_tail(found: Sequence[Change]) -> float | None:
    """Return the growth of the tail of KL if the mean fell and the tail grew beyond the limit."""
    ratios = {change.figure: change.now / change.before for change in found if change.before}
    mean, tail = ratios.get(_MEAN, 1.0), ratios.get(_TAIL, 1.0)
    return tail if mean < 1 and tail > MAX_GROWTH else None


def _figures(model: ModelFigures) -> dict[str, float]:
    figures: dict[str, float | None] = {"perplexity": model.perplexity}
    if model.divergence:
        figures |= {
            _MEAN: model.divergence.mean,
            _TAIL: model.divergence.p99_9,
            "top-1 agreement": model.divergence.top1_agreement,
        }
    if head := model.head:
        figures |= {"error": head.error, "label agreement": head.agreement, "order of rewards": head.order}
        figures |= {"cosine": head.cosine}
    return {name: value for name, value in figures.items() if value is not None}
