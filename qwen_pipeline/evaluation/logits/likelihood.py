"""Log-likelihoods of continuations of contexts, with one decoder layer in memory at a time.

All requests go through a layer before the next layer is read. Requests with the same input tokens, such as the
one-token choices of a question, share one sequence.
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

PASS_TOKENS = 65_536
"""Maximum number of tokens in a pass; their hidden states stay in memory: 2.1 GB at a hidden size of 8192."""
LIKELIHOOD_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Tokens in a batch, by device; at least one sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """Tokens, of which the last ``scored`` are scored: at least one, and never the first token."""

    tokens: tuple[int, ...]
    scored: int

    @property
    def inputs(self) -> tuple[int, ...]:
        """The input of the model: all tokens but the last."""
        return self.tokens[:-1]

    @property
    def targets(self) -> tuple[int, ...]:
        return self.tokens[-self.scored :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """The log-probability of a continuation in nats, and whether each of its tokens was the likeliest."""

    log: float
    greedy: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Distinct sequences of one length, and the indices of the continuations of each."""

    sequences: Sequence[tuple[int, ...]]
    numbers: Sequence[Sequence[int]]


def log_likelihoods(
    model: Checkpoint, continuations: Sequence[Continuation], context: ComputeContext, *, observe: Observe = unobserved
) -> list[Likelihood]:
    """Score continuations; each prediction is a float64 softmax over logits computed in ``context.dtype``.

    Args:
        model: Full precision or GPTQ codes, of any Qwen family.
        continuations: The continuations; the results are in the same order.
        context: Device and dtype of the computation.
        observe: Called for each layer.

    Raises:
        CheckpointRefused: A tensor that the model needs is missing or has another shape.
        InputRefused: A token is not in the vocabulary.
    """
    found: dict[int, Likelihood] = {}
    passes = list(_passes(_batches(continuations, context)))
    for index, batches in enumerate(passes):
        stream = LayerStream(
            model, [torch.tensor(batch.sequences, device=context.device) for batch in batches], context
        )
        depth = len(stream.parts)
        for layer in advance([stream]):
            done = index * depth + layer + 1
            observe(Progress(task="score", done=done, total=len(passes) * depth, unit="layers"))
        found |= _scored(continuations, batches, stream)
    return [found[number] for number in range(len(continuations))]


def _batches(continuations: Sequence[Continuation], context: ComputeContext) -> Iterator[_Batch]:
    """Yield batches, the longest sequences first, so that memory runs out at the start or not at all."""
    numbers: dict[tuple[int, ...], list[int]] = {}
    for number, continuation in enumerate(continuations):
        numbers.setdefault(continuation.inputs, []).append(number)
    for length, group in groupby(sorted(numbers, key=len, reverse=True), key=len):
        sequences, size = list(group), max(1, LIKELIHOOD_BATCH_TOKENS[context.device.type] // length)
        for start in range(0, len(sequences), size):
            part = sequences[start : start + size]
            yield _Batch(sequences=part, numbers=[numbers[sequence] for sequence in part])


def _passes(batches: Iterator[_Batch]) -> Iterator[list[_Batch]]:
    """Yield lists of batches that go through the layers together."""
    pending, tokens = list[_Batch](), 0
    for batch in batches:
        size = sum(map(len, batch.sequences))
        if pending and tokens + size > PASS_TOKENS:
            yield pending
            pending, tokens = [], 0
        pending, tokens = [*pending, batch], tokens + size
    if pending:
        yield pending


@torch.inference_mode()
def _scored(
    continuations: Sequence[Continuation], batches: Sequence[_Batch], stream: LayerStream
) -> dict[int, Likelihood]:
    """Apply the output head, in blocks of rows, to only those states that predict scored tokens."""
    context, order = stream.context, [number for batch in batches for numbers in batch.numbers for number in numbers]
    states = [_predicting(continuations, *pair) for pair in zip(batches, stream.pop_head_inputs(), strict=True)]
    targets_N = torch.tensor(
        [token for number in order for token in continuations[number].targets], device=context.device
    )
    sums = [Softmax(targets) for targets in targets_N.split(list(map(len, states)))]
    for start, rows_VH in stream.head_blocks():
        for softmax, hidden_NH in zip(sums, states, strict=True):
            softmax.update(start, product(context.fetch(hidden_NH), rows_VH).double())
    logs_N = torch.cat([softmax.target - softmax.log_total for softmax in sums])
    greedy_N = torch.cat([softmax.top for softmax in sums]) == targets_N
    counts = [continuations[number].scored for number in order]
    return {
        number: Likelihood(log=logs.sum().item(), greedy=bool(greedy.all()))
        for number, logs, greedy in zip(order, logs_N.split(counts), greedy_N.split(counts), strict=True)
    }


def _predicting(continuations: Sequence[Continuation], batch: _Batch, hidden_BTH: Tensor) -> Tensor:
    """Return the states that predict scored tokens, [N, H], by sequence and then by continuation."""
    return torch.cat(
        [
            states_TH[-continuations[number].scored :]
            for states_TH, numbers in zip(hidden_BTH, batch.numbers, strict=True)
            for number in numbers
        ]
    )
