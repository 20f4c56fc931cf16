"""What the worker measures of each model, in the form that crosses the process boundary and enters reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """KL in nats over the tokens of every window from position ``first`` to the next stretch."""

    first: int
    mean: float
    median: float
    p95: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergenceFigures:
    """KL(reference || candidate) over all predicted tokens in nats, and how often both rate the same token highest.

    ``by_position`` is the mean over windows at each position, and ``stretches`` the spread over neighbouring ones:
    whether distance grows along the context.
    """

    mean: float
    p95: float
    p99_9: float
    max: float
    top1_agreement: float
    by_position: tuple[float, ...] = ()
    stretches: tuple[Stretch, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The activation of a layer that is farthest from zero, what it enters or leaves, such as ``mlp.down_proj``."""

    layer: int
    place: str
    magnitude: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFigures:
    """One model.

    Attributes:
        fault: Why Transformers did not load it, or not all of it; then nothing else is known.
        unplaced: Why Transformers makes up the packed experts of a checkpoint that is sound; it is measured without it.
        perplexity: ``exp`` of the mean surprise over every token but the first of each window.
        tokens: How many tokens were predicted.
        linears: Class name of the linear layers that Transformers loaded -> how many.
        divergence: From the reference model, where asked for.
        drift: Distance of the hidden state from the reference's after each layer, relative to the latter's norm.
        peaks: The largest activation of each layer on the windows.
        calibration_peaks: The same on tokens that it was quantized on, where asked for.
        answers: Token ids of the greedy answer to each prompt, where asked for.
        unanswered: Why there is no answer although it was asked for.
    """

    fault: str | None = None
    unplaced: str | None = None
    perplexity: float | None = None
    tokens: int = 0
    linears: Mapping[str, int] = field(default_factory=dict[str, int])
    divergence: DivergenceFigures | None = None
    drift: tuple[float, ...] = ()
    peaks: tuple[Peak, ...] = ()
    calibration_peaks: tuple[Peak, ...] = ()
    answers: tuple[tuple[int, ...], ...] = ()
    unanswered: str | None = None


_FIGURES = TypeAdapter(dict[str, ModelFigures])


def dump_figures(figures: Mapping[str, ModelFigures]) -> dict[str, Any]:
    """Return role -> figures as JSON values."""
    return _FIGURES.dump_python(dict(figures), mode="json")


def load_figures(value: Mapping[str, Any]) -> dict[str, ModelFigures]:
    """Return what :func:`dump_figures` was given."""
    return _FIGURES.validate_python(value)
