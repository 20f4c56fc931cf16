"""How likely a model finds continuations of contexts, one decoder layer in memory at a time.

All requests go through a layer before the next one is read. Those that enter the model with the same tokens, such as
the one-token choices of a question, are one sequence.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.evaluation.logits.divergence import Softmax
from qwen_pipeline.layerwise.forward import LayerStream, advance, product
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.progress import Observe, Progress, unobserved

PASSAGE_TOKENS = 65_536
"""Tokens whose hidden states wait for the next layer at a time: 2.1 GB at a hidden size of 8192."""
LIKELIHOOD_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Tokens that go through a layer at a time, by device; at least one sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """Tokens, and how many of the last ones are to be scored: at least one, and not the first."""

    tokens: tuple[int, ...]
    scored: int

    @property
    def entering(self) -> tuple[int, ...]:
        """What the model is given: nothing follows the last token."""
        return self.tokens[:-1]

    @property
    def targets(self) -> tuple[int, ...]:
        return self.tokens[-self.scored :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """What a model makes of a continuation: its log-probability in nats, and whether each token was the likeliest."""

    log: float
    greedy: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Different sequences of one length, and the continuations of each by their numbers."""

    sequences: Sequence[tuple[int, ...]]
    numbers: Sequence[Sequence[int]]


def log_likelihoods(
    model: Checkpoint, asked: Sequence[Continuation], context: ComputeContext, *, observe: Observe = unobserved
) -> list[Likelihood]:
    """Score continuations; each prediction is a float64 softmax over logits computed in ``place.dtype``.

    Args:
        model: Full precision or GPTQ codes, of any Qwen family.
        asked: In any order; the results are in the same.
        context: Where to compute, and in what.
        observe: Told about each layer.

    Raises:
        CheckpointRefused: A tensor that the model needs is missing or has another shape.
        InputRefused: A token is not in the vocabulary.
    """
    found: dict[int, Likelihood] = {}
    streams = list(_passages(_batches(asked, context)))
    for turn, batches in enumerate(streams):
        stream = LayerStream(
            model, [torch.tensor(batch.sequences, device=context.device) for batch in batches], context
        )
        depth = len(stream.parts)
        for layer in advance([stream]):
            done = turn * depth + layer + 1
            observe(Progress(task="score", done=done, total=len(streams) * depth, unit="layers"))
        found |= _scored(asked, batches, stream)
    return [found[number] for number in range(len(asked))]


def _batches(asked: Sequence[Continuation], context: ComputeContext) -> Iterator[_Batch]:
    """Yield what enters, the longest sequences first, so that memory runs out at once or not at all."""
    numbers: dict[tuple[int, ...], list[int]] = {}
    for number, continuation in enumerate(asked):
        numbers.setdefault(continuation.entering, []).append(number)
    for length, alike in groupby(sorted(numbers, key=len, reverse=True), key=len):
        sequences, size = list(alike), max(1, LIKELIHOOD_BATCH_TOKENS[context.device.type] // length)
        for start in range(0, len(sequences), size):
            part = sequences[start : start + size]
            yield _Batch(sequences=part, numbers=[numbers[sequence] for sequence in part])


def _passages(batches: Iterator[_Batch]) -> Iterator[list[_Batch]]:
    """Yield batches that are on their way at the same time."""
    together, tokens = list[_Batch](), 0
    for batch in batches:
        size = sum(map(len, batch.sequences))
        if together and tokens + size > PASSAGE_TOKENS:
            yield together
            together, tokens = [], 0
        together, tokens = [*together, batch], tokens + size
    if together:
        yield together


@torch.inference_mode()
def _scored(asked: Sequence[Continuation], batches: Sequence[_Batch], stream: LayerStream) -> dict[int, Likelihood]:
    """Multiply by the output head, a block of its rows after the other, only the states that predict scored tokens."""
    context, order = stream.context, [number for batch in batches for numbers in batch.numbers for number in numbers]
    states = [_predicting(asked, *pair) for pair in zip(batches, stream.pop_head_inputs(), strict=True)]
    targets_N = torch.tensor([token for number in order for token in asked[number].targets], device=context.device)
    sums = [Softmax(targets) for targets in targets_N.split(list(map(len, states)))]
    for start, rows_VH in stream.head_blocks():
        for softmax, hidden_NH in zip(sums, states, strict=True):
            softmax.see(start, product(context.fetch(hidden_NH), rows_VH).double())
    logs_N = torch.cat([softmax.target - softmax.log_total for softmax in sums])
    greedy_N = torch.cat([softmax.top for softmax in sums]) == targets_N
    counts = [asked[number].scored for number in order]
    return {
        number: Likelihood(log=logs.sum().item(), greedy=bool(greedy.all()))
        for number, logs, greedy in zip(order, logs_N.split(counts), greedy_N.split(counts), strict=True)
    }


def _predicting(asked: Sequence[Continuation], batch: _Batch, hidden_BTH: Tensor) -> Tensor:
    """Return the states before scored tokens, [N, H], sequence by sequence and continuation by continuation."""
    return torch.cat(
        [
            states_TH[-asked[number].scored :]
            for states_TH, numbers in zip(hidden_BTH, batch.numbers, strict=True)
            for number in numbers
        ]
    )
