"""The figures that the worker measures for each model, as sent between processes and stored in reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """KL in nats over a range of positions in every window, from ``first`` to the next stretch."""

    first: int
    mean: float
    median: float
    p95: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergenceFigures:
    """KL(reference || candidate) over all predicted tokens in nats, and the share of equal top-1 predictions.

    ``by_position`` is the mean over windows at each position, and ``stretches`` the distribution over ranges of
    positions: they show whether the divergence grows along the context.
    """

    mean: float
    p95: float
    p99_9: float
    max: float
    top1_agreement: float
    by_position: tuple[float, ...] = ()
    stretches: tuple[Stretch, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadFigures:
    """Distance of a classifier's logits, or of embeddings, from the reference's.

    Attributes:
        outputs: Number of texts, or of tokens if each is classified.
        error: Norm of the differences over that of the reference's deviations from their mean.
        max_error: The largest difference of two values.
        agreement: Share of outputs with the same most likely label; None unless there are several labels.
        order: Share of pairs of rewards that have the same order; None unless there is one label.
        cosine: Mean cosine of the embeddings of a text; None for classifiers.
        min_cosine: The lowest such cosine.
    """

    outputs: int
    error: float
    max_error: float
    agreement: float | None = None
    order: float | None = None
    cosine: float | None = None
    min_cosine: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The activation of largest magnitude in a layer, and the module that it enters or leaves (``mlp.down_proj``)."""

    layer: int
    place: str
    magnitude: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFigures:
    """The figures of one model.

    Attributes:
        fault: The reason why Transformers did not load it completely; there are then no other figures.
        unplaced: The reason why Transformers cannot load the packed experts, or the codes of several widths, of a valid
            checkpoint; streamed figures exist.
        computed_from: The role of the model whose weights this one's were computed from; None if they were read.
        perplexity: ``exp`` of the mean negative log-likelihood of every token but the first of each window.
        tokens: Number of predicted tokens.
        linears: Class name of the linear layers that Transformers loaded -> their number.
        divergence: Divergence from the reference model, if requested.
        head: Distance of another head's outputs from the reference's, in place of perplexity and divergence.
        draft_acceptance: Share of the draft head's drafts that the model itself accepts; None without a draft head.
        drift: Distance of the hidden state from the reference's after each layer, relative to the latter's norm.
        peaks: The largest activation of each layer on the windows.
        calibration_peaks: The largest activation of each layer on the calibration tokens, if requested.
        answers: Token ids of the greedy answer to each prompt, if requested.
        unruled_answers: The answers without the rules of the generation config, if requested and if it has any.
        replies: Token ids of the greedy answer to each request of :mod:`qwen_pipeline.evaluation.behaviour`; empty for
            one that does not fit into memory.
        unreplied: The reason why these answers are missing.
        unapplied: Settings of the generation config that would change answers, but are not applied.
        unanswered: The reason why a requested answer is missing.
    """

    fault: str | None = None
    unplaced: str | None = None
    computed_from: str | None = None
    perplexity: float | None = None
    tokens: int = 0
    linears: Mapping[str, int] = field(default_factory=dict[str, int])
    divergence: DivergenceFigures | None = None
    head: HeadFigures | None = None
    draft_acceptance: float | None = None
    drift: tuple[float, ...] = ()
    peaks: tuple[Peak, ...] = ()
    calibration_peaks: tuple[Peak, ...] = ()
    answers: tuple[tuple[int, ...], ...] = ()
    unruled_answers: tuple[tuple[int, ...], ...] = ()
    replies: tuple[tuple[int, ...], ...] = ()
    unreplied: str | None = None
    unapplied: tuple[str, ...] = ()
    unanswered: str | None = None
