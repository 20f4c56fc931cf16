"""Greedy answers of a model whose layers need not all be in memory.

All prompts advance together: a step takes every one of them through a layer before the next layer is read, so that a
model is read once a step, however many prompts there are. Layers that fit into a share of the free memory stay there
and are read once in all. Each prompt has a cache of its own, one of Transformers', so nothing is padded.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, takewhile
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.checkpoint.memory_budget import available_memory
from qwen_pipeline.layerwise.forward import product
from qwen_pipeline.layerwise.meta_model import LayerInputs
from qwen_pipeline.layerwise.model import ComputeContext, LayeredModel
from qwen_pipeline.layerwise.weights import Take
from qwen_pipeline.progress import Observe, Progress, unobserved

SHARE_OF_MEMORY = 0.5
"""Of what is free where a model computes, for layers that stay there; the others are read again at every step."""


@dataclass(slots=True, kw_only=True)
class _Turn:
    """A prompt and what is known of its answer.

    Attributes:
        draft: How the answer may begin; it enters with the prompt, and what the model would not have said is dropped.
        cache: Keys, values and states of the first ``cached`` tokens of prompt and answer.
    """

    prompt: Sequence[int]
    draft: Sequence[int]
    cache: Any
    cached: int = 0
    answer: list[int] = field(default_factory=list[int])

    @property
    def entering(self) -> list[int]:
        return [*self.prompt, *self.answer, *self.draft][self.cached :]


class Decoder(LayeredModel):
    """A model that answers.

    Args:
        checkpoint: Full precision or GPTQ codes, of any Qwen family.
        context: Where to compute.
        room: Bytes for layers and output head that stay in memory; by default :data:`SHARE_OF_MEMORY`.

    Raises:
        CheckpointRefused: A tensor that the model needs is missing or has another shape.
    """

    def __init__(self, checkpoint: Checkpoint, context: ComputeContext, *, room: int | None = None) -> None:
        super().__init__(checkpoint, context)
        self._room = room_in(context) if room is None else room
        self._layers: list[nn.Module] = []
        self._head: list[tuple[int, Tensor]] = []

    @torch.inference_mode()
    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        stops: Collection[int],
        limit: int,
        ends: Callable[[Sequence[int]], bool] = lambda _: False,
        drafts: Sequence[Sequence[int]] = (),
        observe: Observe = unobserved,
    ) -> list[tuple[int, ...]]:
        """Return the tokens that the model finds most likely after each prompt, one after the other.

        Args:
            prompts: Token ids of each prompt.
            stops: Tokens that end an answer; they are part of it.
            limit: Tokens of an answer, at most.
            ends: Told an answer's tokens after each step that it takes without a draft: whether it ends there.
            drafts: What each answer may turn out to be, such as another model's. The answers are the same without
                them; what they have right takes one step together.
            observe: Told after each step how long the longest answer is.
        """
        guesses = [self._known(draft[:limit]) for draft in drafts] or [()] * len(prompts)
        turns = [
            _Turn(prompt=prompt, draft=guess[:-1], cache=self.meta_model.new_cache())
            for prompt, guess in zip(prompts, guesses, strict=True)
        ]
        running = turns
        while running:
            for turn, choices in zip(running, self._step(running), strict=True):
                self._take(turn, choices, stops)
            running = [
                turn
                for turn in running
                if len(turn.answer) < limit and turn.answer[-1] not in stops and not ends(turn.answer)
            ]
            longest = max(len(turn.answer) for turn in turns)
            observe(Progress(task="answer", done=longest if running else limit, total=limit, unit="tokens"))
        return [tuple(turn.answer) for turn in turns]

    def build(self, layer: int, take: Take) -> nn.Module:
        """Return a layer that can be called, and keep it if it is the next one and there is room."""
        module = super().build(layer, take)
        if layer == len(self._layers) and self._takes(self.parts[layer].numel):
            self._layers.append(module)
        return module

    def _step(self, running: Sequence[_Turn]) -> list[list[int]]:
        """Have each turn enter; return what the model says after its last known token, and after each of a draft."""
        tokens = [torch.tensor([turn.entering]) for turn in running]
        entries = [self.meta_model.enter(each, turn.cache) for each, turn in zip(tokens, running, strict=True)]
        hidden = [entry.hidden for entry in entries]
        modules = chain(tuple(self._layers), self.coming(len(self._layers)))
        for layer in range(len(self.parts)):
            hidden = _through(layer, next(modules), hidden, entries)
        heard = [1 + len(turn.draft) for turn in running]
        leaving = [
            self.meta_model.leave(each[:, -last:], states[:, -last:])[0]
            for each, states, last in zip(tokens, hidden, heard, strict=True)
        ]
        return [choices.tolist() for choices in self._likeliest(torch.cat(leaving)).split(heard)]

    def _take(self, turn: _Turn, choices: Sequence[int], stops: Collection[int]) -> None:
        """Add what a turn's model said to its answer: as much of the draft as it agrees with, and one token more."""
        agreed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(choices, turn.draft, strict=False)))
        turn.cached += len(turn.entering)
        if agreed < len(turn.draft):  # states of linear attention cannot forget the rest
            turn.cache, turn.cached = self.meta_model.new_cache(), 0
        ends = [number for number, token in enumerate(choices[:agreed]) if token in stops]
        turn.answer += choices[: min([*ends, agreed]) + 1]
        turn.draft = ()

    def _likeliest(self, hidden_NH: Tensor) -> Tensor:
        """Return the likeliest token for each hidden state, [N]; as in ``argmax``, what is no number is above all."""
        best_N = hidden_NH.new_full((len(hidden_NH),), -torch.inf, dtype=torch.float32)
        tokens_N = torch.zeros_like(best_N, dtype=torch.int64)
        for start, rows_VH in self._head_blocks():
            values_N, places_N = product(hidden_NH, rows_VH).max(dim=-1)
            better_N = ~(values_N <= best_N) & ~best_N.isnan()
            best_N, tokens_N = best_N.where(~better_N, values_N), tokens_N.where(~better_N, places_N + start)
        return tokens_N

    def _head_blocks(self) -> Iterable[tuple[int, Tensor]]:
        """Return the output head in blocks of rows, each with the number of its first."""
        if self._head:
            return self._head
        if self._takes(prod(self.weights.checkpoint[self.weights.head].shape)):
            self._head = list(self.head_blocks())
        return self._head or self.head_blocks()

    def _takes(self, numel: int) -> bool:
        """Take so many numbers' room if it is there."""
        if (nbytes := numel * self.context.dtype.itemsize) > self._room:
            return False
        self._room -= nbytes
        return True

    def _known(self, draft: Sequence[int]) -> Sequence[int]:
        """Return a draft up to the first token that this model does not have."""
        vocabulary = self.weights.checkpoint[self.weights.embedding].rows
        return list(takewhile(lambda token: token < vocabulary, draft))


def room_in(context: ComputeContext) -> int:
    """Return the bytes that layers may occupy where they compute."""
    free = torch.cuda.mem_get_info()[0] if context.device.type == "cuda" else available_memory()
    return int(SHARE_OF_MEMORY * (free or 0))


def _through(layer: int, module: nn.Module, hidden: Sequence[Tensor], entries: Sequence[LayerInputs]) -> list[Tensor]:
    return [module(states, **entry.arguments[layer]) for states, entry in zip(hidden, entries, strict=True)]
