"""The limits on the difference between a quantized model and the model it was made from."""

from dataclasses import asdict, dataclass
from math import isnan

from qwen_pipeline.errors import InputRefused


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Thresholds of the checks. A 135M model at 4 bits passes the defaults; larger models pass them easily.

    Attributes:
        max_perplexity_ratio: Perplexity of the quantized model over that of the merged one.
        max_mean_kl: Mean KL(merged || quantized), in nats per token.
        min_top1_agreement: Share of tokens for which both predict the same most likely token.
        min_draft_acceptance: Share of the draft head's drafts that the quantized model accepts; a warning below it.
        max_padding_kl: Mean KL(merged || padded), in nats per token: padding may differ by rounding only.
        min_same_calls: Share of the merged model's tool calls that the quantized one makes too; this limit and the four
            after it lead to warnings.
        max_thinking_ratio: Tokens of the quantized model's thought over those of the merged one's.
        min_json: Share of the merged model's answers in JSON where the quantized one's are JSON too.
        min_ended: Share of the answers that the merged model ends and the quantized one ends too.
        min_needles: Share of the sentences in a long text that the merged model finds and the quantized one finds too.
        max_kl_growth: Mean KL in the last quarter of a window over that in the first; a warning beyond it.
        max_activation: Magnitude of any activation of the quantized model; a warning beyond it. The float16 maximum is
            65504, and neither held-out text nor calibration contains the token with the largest activations.
        max_head_error: Norm of the differences between the logits of two classifiers, over that of the merged model's
            deviations from their mean.
        min_label_agreement: Share of texts or tokens that both give the same most likely label.
        min_reward_order: Share of pairs of texts that both reward in the same order.
        min_embedding_cosine: Mean cosine of the two embeddings of a text.
        max_padding_error: Largest norm of the differences that padding makes to the outputs of another head, relative
            as for ``max_head_error``.
        max_merged_ratio: Perplexity of the merged model over that of the base; a warning beyond it.
        max_served_gap: Log-probability in nats by which a serving engine may prefer its own token to that of
            Transformers where their answers first differ. Correct 16-bit kernels differ at ties, broken ones by several
            nats.
    """

    max_perplexity_ratio: float = 1.2
    max_mean_kl: float = 0.3
    min_top1_agreement: float = 0.7
    min_draft_acceptance: float = 0.4
    min_same_calls: float = 0.5
    max_thinking_ratio: float = 2.0
    min_json: float = 1.0
    min_ended: float = 0.75
    min_needles: float = 1.0
    max_kl_growth: float = 2.0
    max_padding_kl: float = 1e-6
    max_head_error: float = 0.5
    min_label_agreement: float = 0.85
    min_reward_order: float = 0.85
    min_embedding_cosine: float = 0.9
    max_padding_error: float = 1e-4
    max_merged_ratio: float = 1.1
    max_served_gap: float = 0.5
    max_activation: float = 65504 / 2

    def __post_init__(self) -> None:
        for name, limit in asdict(self).items():
            if isnan(limit):
                raise InputRefused(f"The limit {name} is not a number.", remedy=f"Set {name} to a number, or omit it.")


DEFAULT_LIMITS = Limits()
