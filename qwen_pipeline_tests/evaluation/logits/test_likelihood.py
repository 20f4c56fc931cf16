"""Likelihoods of continuations, compared with a plain Transformers computation."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.evaluation.logits import likelihood
from qwen_pipeline.evaluation.logits.likelihood import Continuation, log_likelihoods
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.progress import Progress
from qwen_pipeline_tests.chain import Chain
from qwen_pipeline_tests.tiny import VOCABULARY, load_tiny, tiny_model, tiny_qwen2

CPU = ComputeContext(device=torch.device("cpu"), dtype=torch.float32)


def asked_of(lengths: Sequence[tuple[int, int]]) -> list[Continuation]:
    """Return random continuations: tokens, and the number of scored ones."""
    generator = torch.Generator().manual_seed(5)
    return [
        Continuation(tokens=tuple(torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()), scored=scored)
        for length, scored in lengths
    ]


ASKED = asked_of([(12, 3), (7, 6), (12, 1), (30, 4), (2, 1), (12, 11)])


@torch.no_grad()
def plain(root: Path, asked: Sequence[Continuation]) -> tuple[list[float], list[bool]]:
    """Return log-likelihoods, and whether all tokens are the likeliest ones."""
    model = load_tiny(root)
    logs, greedy = list[float](), list[bool]()
    for each in asked:
        logits_TV = model(torch.tensor([each.inputs])).logits[0, -each.scored :].double()
        targets_T = torch.tensor(each.tokens[-each.scored :])
        logs.append(logits_TV.log_softmax(-1).gather(1, targets_T[:, None]).sum().item())
        greedy.append(bool((logits_TV.argmax(-1) == targets_T).all()))
    return logs, greedy


def with_likeliest(root: Path, asked: Sequence[Continuation]) -> list[Continuation]:
    """Add for each a continuation whose last token is the likeliest one: both have the same input."""
    model = load_tiny(root)
    best = [int(model(torch.tensor([each.inputs])).logits[0, -1].argmax()) for each in asked]
    likely = [Continuation(tokens=(*each.inputs, token), scored=1) for each, token in zip(asked, best, strict=True)]
    return [*asked, *likely]


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "qwen3_next"])
def test_likelihoods_equal_those_of_plain_transformers(family: str, tmp_path: Path) -> None:
    root = tiny_model(family, tmp_path / "model")
    asked = with_likeliest(root, ASKED)
    logs, greedy = plain(root, asked)
    found = log_likelihoods(open_checkpoint(root), asked, CPU)
    assert [each.log for each in found] == pytest.approx(logs, abs=1e-4)
    assert [each.greedy for each in found] == greedy
    assert True in greedy
    assert False in greedy


def test_likelihoods_do_not_depend_on_batches_and_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_checkpoint(tiny_qwen2(tmp_path / "model"))
    together = log_likelihoods(model, ASKED, CPU)
    monkeypatch.setattr(likelihood, "PASS_TOKENS", 12)
    monkeypatch.setattr(likelihood, "LIKELIHOOD_BATCH_TOKENS", {"cpu": 1})
    told: list[Progress] = []
    apart = log_likelihoods(model, ASKED, CPU, observe=told.append)
    assert [each.log for each in apart] == pytest.approx([each.log for each in together], abs=1e-5)
    assert [each.greedy for each in apart] == [each.greedy for each in together]
    assert [event.done for event in told] == list(range(1, told[-1].total + 1))
    assert told[-1].total == 5 * 2, "five passages through two layers"


def test_no_continuations_give_no_likelihoods(tmp_path: Path) -> None:
    assert log_likelihoods(open_checkpoint(tiny_qwen2(tmp_path / "model")), [], CPU) == []


def test_codes_are_scored_like_their_dequantized_weights(chain: Chain) -> None:
    found, full = (log_likelihoods(open_checkpoint(root), ASKED, CPU) for root in (chain.quantized, chain.padded))
    gaps = [abs(a.log - b.log) / each.scored for a, b, each in zip(found, full, ASKED, strict=True)]
    assert 0 < max(gaps) < 2
