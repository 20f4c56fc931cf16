"""An allocation as settings and as JSON values."""

import re
from typing import Any

from qwen_pipeline.evaluation.allocation.allocate import Allocation
from qwen_pipeline.qwen.precision import KEEP

NAMED = 4
"""Highest number of linear layers of a unit that a pattern names one by one; experts have a common name."""
POINTS = 200
"""Number of points of the curve among the JSON values, about."""


def usual_word(allocation: Allocation) -> str:
    """Return the precision of most weights with codes, which is the quantization's own."""
    totals = {each.word: 0 for each in allocation.uniform}
    for unit, word in zip(allocation.units, allocation.words, strict=True):
        if word != KEEP:
            totals[word] += unit.numel
    return max(totals, key=lambda word: totals[word])


def modules_of(allocation: Allocation) -> dict[str, str]:
    """Return the choice as the setting ``quantization.modules``: patterns for what has not the usual precision."""
    usual = usual_word(allocation)
    layers: dict[tuple[str, str], list[int]] = {}
    for unit, word in zip(allocation.units, allocation.words, strict=True):
        if word != usual:
            layers.setdefault((unit.kind, word), []).append(unit.layer)
    parts = {unit.kind: sorted({linear.kind for linear in unit.linears}) for unit in allocation.units}
    return {_pattern(kind, parts[kind], numbers): word for (kind, word), numbers in layers.items()}


def _pattern(kind: str, parts: list[str], layers: list[int]) -> str:
    names = "|".join(map(re.escape, parts)) if len(parts) <= NAMED else re.escape(kind) + r"\."
    return rf"layers\.(?:{'|'.join(map(str, layers))})\.(?:{names})"


def to_toml(allocation: Allocation) -> str:
    """Return the choice as sections of ``qwen_pipeline.toml``."""
    bits, _, group_size = usual_word(allocation).partition("g")
    own = ["[quantization]", f"bits = {bits}", f"group_size = {group_size}"]
    modules = [f"'{pattern}' = \"{word}\"" for pattern, word in modules_of(allocation).items()]
    return "\n".join([*own, "", "[quantization.modules]", *modules, ""])


def as_json(allocation: Allocation) -> dict[str, Any]:
    """Return the allocation as JSON values; the curve is thinned to :data:`POINTS` points, about."""
    other = allocation.other_bytes
    return {
        "bytes": allocation.chosen.nbytes + other,
        "bits": allocation.bits(allocation.chosen),
        "predicted_kl": allocation.predicted,
        "measured_kl": allocation.measured,
        "anchors": [
            {"bytes": each.point.nbytes + other, "kl": each.kl, "sum_of_parts": each.point.cost}
            for each in allocation.anchors
        ],
        "usual": usual_word(allocation),
        "modules": modules_of(allocation),
        "uniform": [
            {"precision": each.word, "bytes": each.nbytes + other, "kl": each.kl, "sum_of_parts": each.sum_of_parts}
            for each in allocation.uniform
        ],
        "units": [
            {
                "layer": unit.layer,
                "module": unit.kind,
                "precision": word,
                "bytes": dict(unit.nbytes),
                "kl": {part.word: value for part, value in allocation.kl.items() if part.unit == number},
            }
            for number, (unit, word) in enumerate(zip(allocation.units, allocation.words, strict=True))
        ],
        "curve": [
            {"bytes": point.nbytes + other, "bits": allocation.bits(point), "kl": allocation.predict(point)}
            for point in allocation.curve[:: max(len(allocation.curve) // POINTS, 1)]
        ],
    }
