"""The allocation of precisions for a size, for average bits, or for a divergence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log

import numpy as np
from torch import Tensor

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.allocation.goals import Goal
from qwen_pipeline.evaluation.allocation.knapsack import Option, Point, frontier
from qwen_pipeline.evaluation.allocation.parts import Part, divergences_of_parts
from qwen_pipeline.evaluation.allocation.units import Unit, composed, units_of
from qwen_pipeline.evaluation.logits.streamed import evaluate
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.qwen.precision import KEEP

FULL = "full"
NOTHING = Point(nbytes=0, cost=0.0, picks=())
ANCHORS = (0.7, 0.4, 0.2, 0.08)
"""Shares of the smallest choice's cost at which the KL of a choice is measured before one is made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform:
    """A candidate as a whole: the size of its units, the sum of its parts' KL, and its measured KL."""

    word: str
    nbytes: int
    sum_of_parts: float
    kl: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """A point of the curve whose KL was measured, as a whole."""

    point: Point
    kl: float

    @property
    def scale(self) -> float:
        """Factor from the sum of the parts' KL to that of the whole."""
        return self.kl / self.point.cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """A choice of a precision for each unit, and the curve from which it was chosen.

    Attributes:
        units: The units.
        other_bytes: Bytes of everything outside the units: embedding, heads, norms, towers.
        kl: (unit, word) -> measured KL of the model of which only this unit has codes.
        uniform: The candidates, each as a whole.
        curve: The best choices for each size; ``cost`` is the sum of the parts' KL.
        anchors: Points of the curve that were measured, from the smallest size to the largest.
        words: The chosen precision of each unit.
        chosen: The point of the curve that was chosen.
        measured: Measured KL of the chosen codes and weights together.
    """

    units: Sequence[Unit]
    other_bytes: int
    kl: Mapping[Part, float]
    uniform: Sequence[Uniform]
    curve: Sequence[Point]
    anchors: Sequence[Anchor] = ()
    words: Sequence[str] = ()
    chosen: Point = NOTHING
    measured: float = 0.0

    def predict(self, point: Point) -> float:
        """Return the predicted KL of a point: its cost, times a scale interpolated between measured points."""
        if not point.cost or not self.anchors:
            return point.cost
        known = self.anchors[::-1]
        costs, scales = [log(anchor.point.cost) for anchor in known], [anchor.scale for anchor in known]
        return point.cost * float(np.interp(log(point.cost), costs, scales))

    @property
    def predicted(self) -> float:
        """Predicted KL of the choice."""
        return self.predict(self.chosen)

    @property
    def numel(self) -> int:
        """Number of weights of all units."""
        return sum(unit.numel for unit in self.units)

    def bits(self, point: Point) -> float:
        """Return the average bits of the units' weights."""
        return 8 * point.nbytes / self.numel


def allocate(
    source: Checkpoint,
    candidates: Sequence[Checkpoint],
    windows: Sequence[Tensor],
    goal: Goal,
    context: ComputeContext,
    *,
    observe: Observe = unobserved,
) -> Allocation:
    """Choose the precision of each unit.

    The parts' KL are summed, as they are small and nearly independent. How nearly depends on the size: a few choices
    are measured as a whole, the sum is scaled to agree with them, and the final choice is measured as a whole too, with
    the candidates' codes.

    Args:
        source: The checkpoint in full precision that the candidates were quantized from.
        candidates: Quantizations of it, each with one precision for all linear layers.
        windows: Held-out token ids [T], all of the same length.
        goal: The limit to keep.
        context: Device and dtype of the computation.
        observe: Called with the progress.

    Raises:
        InputRefused: No choice keeps the limit; the message has the possible range. Or a candidate does not fit.
    """
    units, by_word = units_of(source, candidates)
    kl = divergences_of_parts(source, by_word, units, windows, context, observe=observe)
    options = {word: _options(units, kl, word) for word in (*by_word, KEEP)}
    curve = frontier([list(each) for each in zip(*options.values(), strict=True)])
    points = _spread(curve)
    choices = [[word] * len(units) for word in by_word] + [_words(by_word, point) for point in points]
    measured = _divergences(source, [composed(source, by_word, units, words) for words in choices], windows, context)
    draft = Allocation(
        units=units,
        other_bytes=sum(spec.nbytes for spec in source.values()) - sum(unit.nbytes[KEEP] for unit in units),
        kl=kl,
        uniform=[
            Uniform(
                word=word,
                nbytes=sum(option.nbytes for option in options[word]),
                sum_of_parts=sum(option.cost for option in options[word]),
                kl=found,
            )
            for word, found in zip(by_word, measured, strict=False)
        ],
        curve=curve,
        anchors=[Anchor(point=point, kl=found) for point, found in zip(points, measured[len(by_word) :], strict=True)],
    )
    chosen = _chosen(draft, goal)
    words = _words(by_word, chosen)
    (found,) = _divergences(source, [composed(source, by_word, units, words)], windows, context)
    return replace(draft, words=words, chosen=chosen, measured=found)


def _options(units: Sequence[Unit], kl: Mapping[Part, float], word: str) -> list[Option]:
    costs = [0.0 if word == KEEP else max(kl[Part(number, word)], 0.0) for number in range(len(units))]
    return [Option(nbytes=unit.nbytes[word], cost=cost) for unit, cost in zip(units, costs, strict=True)]


def _words(candidates: Mapping[str, Checkpoint], point: Point) -> list[str]:
    """Return the precision of each unit."""
    return [[*candidates, KEEP][pick] for pick in point.picks]


def _spread(curve: Sequence[Point]) -> list[Point]:
    """Return the smallest choice, and those that cost certain shares of it."""
    at = [next((point for point in curve if point.cost <= share * curve[0].cost), curve[-1]) for share in (1, *ANCHORS)]
    return [point for point in dict.fromkeys(at) if point.cost]


def _divergences(
    source: Checkpoint, others: Sequence[Checkpoint], windows: Sequence[Tensor], context: ComputeContext
) -> list[float]:
    """Return the mean KL of each model, all in one pass."""
    models = {str(number): model for number, model in enumerate(others)}
    figures = evaluate({FULL: source, **models}, windows, reference=FULL, compared=list(models), context=context)
    return [found.mean for role in models if (found := figures[role].divergence)]


def _chosen(draft: Allocation, goal: Goal) -> Point:
    """Return the point of the curve with the least KL that keeps a size, or the smallest one that keeps a KL."""
    if goal.measure == "kl":
        kept = [point for point in draft.curve if draft.predict(point) <= goal.value][:1]
    else:
        limit = goal.value - draft.other_bytes if goal.measure == "bytes" else goal.value * draft.numel / 8
        kept = [point for point in draft.curve if point.nbytes <= limit][-1:]
    if kept:
        return kept[0]
    smallest = draft.curve[0]
    raise InputRefused(
        f"No choice has at most {goal.value:,g} {goal.measure}; the smallest that these candidates allow has"
        f" {smallest.nbytes + draft.other_bytes:,} bytes, {draft.bits(smallest):.2f} bits and a KL of"
        f" {draft.predict(smallest):.3g}.",
        remedy="Allow more, or pass a candidate of fewer bits or larger groups.",
    )
