"""A linear layer with small, correlated inputs, and its padding with dead channels."""

import torch

LIVE, PADDED, OUT = 384, 512, 64


def tokens_and_weight() -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs [N, I] and a weight [O, I], with I live channels."""
    torch.manual_seed(0)
    tokens = torch.randn(2048, LIVE) @ torch.randn(LIVE, LIVE) * LIVE**-0.5 * 0.01
    return tokens, torch.randn(OUT, LIVE) * 0.02


def padded(live: torch.Tensor) -> torch.Tensor:
    return torch.cat([live, torch.zeros(live.shape[0], PADDED - LIVE)], dim=1)
