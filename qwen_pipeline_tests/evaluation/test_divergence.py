"""Surprise and divergence against the definition, computed the slow way."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from qwen_pipeline.evaluation.divergence import BLOCK_TOKENS, token_divergence, token_nll


@given(st.integers(0, 2**31), st.integers(1, 2 * BLOCK_TOKENS + 3), st.integers(2, 40), st.floats(0.01, 50))
@settings(max_examples=40, deadline=None)
def test_blocks_give_what_torch_distributions_gives(seed: int, tokens: int, vocabulary: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    reference, candidate = (scale * torch.randn(tokens, vocabulary, generator=generator) for _ in range(2))
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    p, q = Categorical(logits=reference.double()), Categorical(logits=candidate.double())

    found = token_divergence(reference, candidate)
    torch.testing.assert_close(token_nll(reference, targets), -p.log_prob(targets))
    torch.testing.assert_close(found.kl, kl_divergence(p, q), rtol=1e-7, atol=1e-9)
    assert torch.equal(found.agrees, p.probs.argmax(-1) == q.probs.argmax(-1))


def test_a_model_does_not_diverge_from_itself() -> None:
    logits = torch.randn(5, 1000)
    found = token_divergence(logits, logits.clone())
    assert found.kl.abs().max() == 0
    assert found.agrees.all()
