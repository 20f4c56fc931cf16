"""How surprised a model is by each token, and how far two models' predictions are apart. Pure tensor maths.

Everything is computed in float64 from float32 logits, a block of tokens at a time: the difference between a model and
its padded self is around 1e-9, below what float32 can sum over a vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

BLOCK_TOKENS = 64
"""Tokens whose log-probabilities over the vocabulary are in memory at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Two models' predictions compared, one value per predicted token.

    Attributes:
        kl: KL(reference || candidate) in nats, float64 [T].
        agrees: Whether both give the highest probability to the same token, bool [T].
    """

    kl: torch.Tensor
    agrees: torch.Tensor


def token_nll(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """Return ``-log p(target)`` in nats for each token, float64 [T]."""
    blocks = [
        -torch.log_softmax(logits_TV[block].double(), dim=-1).gather(1, targets_T[block, None]).squeeze(1)
        for block in _blocks(len(targets_T))
    ]
    return torch.cat(blocks)


def token_divergence(reference_TV: torch.Tensor, candidate_TV: torch.Tensor) -> Divergence:
    """Compare the predictions behind two models' logits [T, V]."""
    kl = torch.empty(len(reference_TV), dtype=torch.float64)
    for block in _blocks(len(reference_TV)):
        log_p = torch.log_softmax(reference_TV[block].double(), dim=-1)
        log_q = torch.log_softmax(candidate_TV[block].double(), dim=-1)
        kl[block] = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return Divergence(kl=kl, agrees=reference_TV.argmax(dim=-1) == candidate_TV.argmax(dim=-1))


def _blocks(tokens: int) -> Iterator[slice]:
    for start in range(0, tokens, BLOCK_TOKENS):
        yield slice(start, start + BLOCK_TOKENS)
