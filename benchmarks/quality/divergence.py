"""KL(full precision || quantized) token by token, and its mean, tail, rare tokens and positions."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.evaluation.logits.divergence import Predictions
from qwen_pipeline.evaluation.logits.streamed import EVALUATION_BATCH_TOKENS
from qwen_pipeline.layerwise.forward import LayerStream, advance, logit_blocks
from qwen_pipeline.layerwise.model import ComputeContext

TAIL = 0.001
"""Share of the tokens, those with the largest KL, whose mean is a figure of its own."""
FIRST = 32
"""Positions whose context is called short."""
RARE = 5
"""A token is rare if the calibration text has it fewer times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFigures:
    """Figures of each prediction, W windows of T tokens.

    Attributes:
        kl: KL(full || quantized) in nats, float64 [W, T - 1].
        nll: Negative log-likelihood of the actual token, of the quantized model.
        nll_full: That of the full-precision model.
        agrees: Whether both have the same most likely token.
        targets: The actual tokens.
    """

    kl: Tensor
    nll: Tensor
    nll_full: Tensor
    agrees: Tensor
    targets: Tensor

    def summary(self, counts_V: Tensor) -> dict[str, float]:
        """Return means over the tokens, and over parts of them.

        Args:
            counts_V: How often the calibration text has each token.
        """
        kl_N, positions = self.kl.flatten(), self.kl.shape[1]
        rare_WT = counts_V[self.targets] < RARE
        parts = {
            "kl": kl_N,
            "tail": kl_N.topk(ceil(TAIL * len(kl_N))).values,
            "rare": self.kl[rare_WT],
            "first": self.kl[:, :FIRST],
            "last": self.kl[:, positions * 3 // 4 :],
        }
        return {
            **{name: part.mean().item() for name, part in parts.items()},
            "p95": kl_N.quantile(0.95).item(),
            "p99_9": kl_N.quantile(1 - TAIL).item(),
            "rare_share": rare_WT.double().mean().item(),
            "top1": self.agrees.double().mean().item(),
            "perplexity": self.nll.mean().exp().item(),
            "perplexity_full": self.nll_full.mean().exp().item(),
        }


def compare_tokens(
    full: Checkpoint, quantized: Checkpoint, windows: Sequence[Sequence[int]], context: ComputeContext
) -> TokenFigures:
    """Return the figures of each prediction of windows of equal length."""
    tokens_WT = torch.tensor(windows, device=context.device)
    batches = tokens_WT.split(max(1, EVALUATION_BATCH_TOKENS[context.device.type] // tokens_WT.shape[1]))
    models = {"full": full, "quantized": quantized}
    streams = {role: LayerStream(each, batches, context, other_models=1) for role, each in models.items()}
    for _ in advance(list(streams.values())):
        pass
    predictions = [
        Predictions(batch[:, 1:].flatten(), roles=models, reference="full", compared=["quantized"]) for batch in batches
    ]
    for block in logit_blocks(list(streams.values()), context):
        predictions[block.batch].update(block.first, dict(zip(models, block.values, strict=True)))

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).view(len(tokens_WT), -1).cpu()

    return TokenFigures(
        kl=joined([each.kl("quantized") for each in predictions]),
        nll=joined([each.nll("quantized") for each in predictions]),
        nll_full=joined([each.nll("full") for each in predictions]),
        agrees=joined([each.agrees("quantized") for each in predictions]),
        targets=tokens_WT[:, 1:].cpu(),
    )


def token_counts(tokens: Sequence[int], vocabulary: int) -> Tensor:
    """Return how often each token occurs, int64 [V]."""
    return torch.bincount(torch.tensor(tokens), minlength=vocabulary)


def rounded(value: Any) -> Any:
    """Return JSON values whose floats have six significant digits."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
