"""Negative log-likelihood and divergence, compared with a direct computation of the definition."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from qwen_pipeline.evaluation.logits.divergence import Predictions


def seen(targets: torch.Tensor, part: int, **logits: torch.Tensor) -> Predictions:
    """Add logits in blocks of the vocabulary."""
    found = Predictions(targets, roles=logits, reference="p", compared=[role for role in logits if role != "p"])
    for first in range(0, logits["p"].shape[1], part):
        found.update(first, {role: values[:, first : first + part] for role, values in logits.items()})
    return found


@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(2, 40), st.integers(1, 40), st.floats(0.01, 50))
@settings(max_examples=40)
def test_parts_of_a_vocabulary_give_what_torch_distributions_gives(
    seed: int, tokens: int, vocabulary: int, part: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_p, logits_q = (scale * torch.randn(tokens, vocabulary, generator=generator) for _ in range(2))
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    p, q = Categorical(logits=logits_p.double()), Categorical(logits=logits_q.double())

    found = seen(targets, part, p=logits_p, q=logits_q)
    torch.testing.assert_close(found.nll("p"), -p.log_prob(targets))
    torch.testing.assert_close(found.nll("q"), -q.log_prob(targets))
    torch.testing.assert_close(found.kl("q"), kl_divergence(p, q), rtol=1e-7, atol=1e-9)
    assert torch.equal(found.agrees("q"), p.probs.argmax(-1) == q.probs.argmax(-1))


def test_a_model_does_not_diverge_from_itself() -> None:
    logits = torch.randn(5, 1000)
    found = seen(torch.zeros(5, dtype=torch.int64), 300, p=logits, q=logits.clone())
    assert found.kl("q").abs().max() == 0
    assert found.agrees("q").all()
