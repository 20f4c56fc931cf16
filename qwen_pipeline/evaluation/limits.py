"""The limits on the difference between a quantized model and the model it was made from."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Thresholds of the checks. A 135M model at 4 bits passes the defaults; larger models pass them easily.

    Attributes:
        max_perplexity_ratio: Perplexity of the quantized model over that of the merged one.
        max_mean_kl: Mean KL(merged || quantized), in nats per token.
        min_top1_agreement: Share of tokens for which both predict the same most likely token.
        max_padding_kl: Mean KL(merged || padded), in nats per token: padding may differ by rounding only.
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
    max_padding_kl: float = 1e-6
    max_head_error: float = 0.5
    min_label_agreement: float = 0.85
    min_reward_order: float = 0.85
    min_embedding_cosine: float = 0.9
    max_padding_error: float = 1e-4
    max_merged_ratio: float = 1.1
    max_served_gap: float = 0.5
    max_activation: float = 65504 / 2


DEFAULT_LIMITS = Limits()
