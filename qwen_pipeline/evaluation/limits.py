"""How far a quantized model may be from the model it was made from."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Thresholds of the checks. The defaults let a 135M model at 4 bits pass; larger models stay far below them.

    Attributes:
        max_perplexity_ratio: Perplexity of the quantized model over that of the merged one.
        max_mean_kl: Mean KL(merged || quantized), in nats a token.
        min_top1_agreement: Share of tokens for which both rate the same token highest.
        max_padding_kl: Mean KL(merged || padded), in nats a token: padding may only show as rounding.
        max_activation: Magnitude of any activation of the quantized model; a warning beyond it. Float16 ends at 65504,
            and neither held-out text nor calibration holds the loudest token there is.
        max_merged_ratio: Perplexity of the merged model over that of the base; a warning beyond it.
        max_served_gap: How much likelier a serving engine may find its own token than the one that Transformers chose,
            where their answers part, in nats. Sixteen-bit kernels part at ties; broken ones by several nats.
    """

    max_perplexity_ratio: float = 1.2
    max_mean_kl: float = 0.3
    min_top1_agreement: float = 0.7
    max_padding_kl: float = 1e-6
    max_merged_ratio: float = 1.1
    max_served_gap: float = 0.5
    max_activation: float = 65504 / 2


DEFAULT_LIMITS = Limits()
