"""A validation held against the one that the last release of the same fine-tune went out with."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.figures import ModelFigures, load_figures
from qwen_pipeline.evaluation.findings import QUANTIZED
from qwen_pipeline.reports import CheckReport, CheckSpec, shown

NOT_WORSE = CheckSpec(
    name="not_worse_than_release",
    description="On the same text, the quantized model is about as good as in the last release of this fine-tune.",
    blocking=False,
)
MAX_GROWTH = 1.02
"""Perplexity of the new quantized model over the released one's; beyond it somebody should look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationVerdict:
    """What a validation found of the quantized model, and the digest of the text that it read."""

    quantized: ModelFigures
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One figure before and now."""

    figure: str
    before: float
    now: float


def load_verdict(root: Path) -> ValidationVerdict:
    """Read the verdict of a validation, or of a release, which holds its validation.

    Raises:
        InputRefused: The directory has neither.
    """
    folder = next((folder for folder in (root, root / "validation") if (folder / "report.json").is_file()), None)
    if folder is None:
        raise InputRefused(
            f"{root} holds no validation report.", remedy="Name a directory that `validate` or `publish` made."
        )
    result: Mapping[str, Any] = json.loads((folder / "report.json").read_bytes())
    return ValidationVerdict(quantized=load_figures(result["findings"]["models"])[QUANTIZED], text=result["text"])


def changes(before: ValidationVerdict, now: ValidationVerdict) -> list[Change]:
    """Return the figures that both verdicts have."""
    old, new = _figures(before.quantized), _figures(now.quantized)
    return [Change(figure=name, before=old[name], now=new[name]) for name in old if name in new]


def compare(released: ValidationVerdict | None, now: ValidationVerdict) -> CheckReport:
    """Report whether the quantized model became worse since the last release."""
    if released is None:
        return NOT_WORSE.skipped("There is no earlier release to compare with.")
    if released.text != now.text:
        return NOT_WORSE.skipped("The last release was measured on another text.")
    found = changes(released, now)
    growth = next((change.now / change.before for change in found if change.figure == "perplexity"), None)
    if growth is None:
        return NOT_WORSE.report(passed=False, detail="Not compared: one of the two did not load.")
    moved = ", ".join(f"{change.figure} {shown(change.before)} -> {shown(change.now)}" for change in found)
    return NOT_WORSE.report(
        passed=growth <= MAX_GROWTH,
        measured=growth,
        limit=MAX_GROWTH,
        detail=f"{f'Regressed by {growth - 1:.1%}' if growth > MAX_GROWTH else 'Held'}: {moved}.",
    )


def _figures(model: ModelFigures) -> dict[str, float]:
    figures = {"perplexity": model.perplexity}
    if model.divergence:
        figures |= {"mean KL": model.divergence.mean, "top-1 agreement": model.divergence.top1_agreement}
    return {name: value for name, value in figures.items() if value is not None}
