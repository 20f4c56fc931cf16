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
        max_merged_ratio: Perplexity of the merged model over that of the base; a warning beyond it.
        max_served_gap: Log-probability in nats by which a serving engine may prefer its own token to that of
            Transformers where their answers first differ. Correct 16-bit kernels differ at ties, broken ones by several
            nats.
    """

    max_perplexity_ratio: float = 1.2
    max_mean_kl: float = 0.3
    min_top1_agreement: float = 0.7
    max_padding_kl: float = 1e-6
    max_merged_ratio: float = 1.1
    max_served_gap: float = 0.5
    max_activation: float = 65504 / 2


DEFAULT_LIMITS = Limits()
