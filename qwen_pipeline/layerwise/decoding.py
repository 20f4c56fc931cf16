"""Greedy decoding with a model whose layers need not all fit into memory.

All prompts advance together: a step runs every prompt through a layer before the next layer is read, so the model is
read once per step, regardless of the number of prompts. Layers that fit into a share of the free memory stay there and
are read only once: as they compute, if all of them fit, else as they are stored, which takes half of the memory, or an
eighth for codes. Each prompt has its own cache of Transformers, so nothing is padded.

A model that does not fit is read at each step. A similar one that fits, such as its quantized version, saves most of
the steps: it proposes the next tokens, and the model decodes in one step as many of them as it would have chosen, and
one more (speculative decoding, arXiv:2211.17192; greedily, so that the answers stay the same).
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, takewhile
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.checkpoint.memory_budget import available_memory
from qwen_pipeline.layerwise.forward import product
from qwen_pipeline.layerwise.greedy_rules import GreedyRules
from qwen_pipeline.layerwise.meta_model import LayerInputs
from qwen_pipeline.layerwise.model import ComputeContext, LayeredModel
from qwen_pipeline.layerwise.weights import Take
from qwen_pipeline.progress import Observe, Progress, unobserved

NO_RULES = GreedyRules()
SHARE_OF_MEMORY = 0.5
"""Share of the free memory of the device for layers that stay there; the others are read again at every step."""
PROPOSED_TOKENS = 8
"""Tokens that another model proposes at a time."""


@dataclass(slots=True, kw_only=True)
class _Sequence:
    """A prompt and the part of its answer that is decoded.

    Attributes:
        draft: Proposed continuation of the answer; processed with the prompt, and dropped from the first token that
            the model would not have chosen.
        cache: Keys, values and states of the first ``cached`` tokens of prompt and answer.
        limit: Maximum number of tokens of the answer.
        processors: Rules that change the scores of the next token, given the tokens before it.
    """

    prompt: Sequence[int]
    draft: Sequence[int]
    cache: Any
    limit: int
    processors: LogitsProcessorList
    cached: int = 0
    answer: list[int] = field(default_factory=list[int])

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *self.answer, *self.draft]

    @property
    def uncached(self) -> list[int]:
        return self.tokens[self.cached :]

    def choices(self, logits_NV: Tensor) -> Tensor:
        """Return the tokens with the highest scores after the last known token and each token of the draft, [N]."""
        tokens: Any = torch.tensor([self.tokens], device=logits_NV.device)
        first = tokens.shape[1] - len(self.draft)
        scores = [
            self.processors(tokens[:, : first + number], logits_V[None].float())
            for number, logits_V in enumerate(logits_NV)
        ]
        return torch.cat([each.argmax(dim=-1) for each in scores])


class Decoder(LayeredModel):
    """A model that decodes greedily.

    Args:
        checkpoint: Full precision, GPTQ codes or 8-bit floats, of any Qwen family.
        context: Device and dtype of the computation.
        budget: Bytes for layers and output head that stay in memory; by default :data:`SHARE_OF_MEMORY` of the free
            memory.

    Raises:
        CheckpointRefused: A tensor that the model needs is missing or has another shape.
    """

    def __init__(self, checkpoint: Checkpoint, context: ComputeContext, *, budget: int | None = None) -> None:
        super().__init__(checkpoint, context)
        self._budget = default_budget(context) if budget is None else budget
        whole = sum(part.numel for part in self.parts) + prod(self.weights.checkpoint[self.weights.head].shape)
        self._keeps_stored = whole * context.dtype.itemsize > self._budget
        self._resident: list[Callable[[], nn.Module]] = []
        self._head: list[tuple[int, Tensor]] = []

    @property
    def is_resident(self) -> bool:
        """True once all layers are in memory, which is the case after the first step if they fit."""
        return len(self._resident) == len(self.parts)

    @property
    def is_compact(self) -> bool:
        """True if all layers are in memory as they are stored, because they would not fit as they compute."""
        return self._keeps_stored and self.is_resident

    @torch.inference_mode()
    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        stops: Collection[int],
        limit: int | Sequence[int],
        is_complete: Callable[[Sequence[int]], bool] = lambda _: False,
        drafts: Sequence[Sequence[int]] = (),
        rules: GreedyRules = NO_RULES,
        proposer: "Decoder | None" = None,
        observe: Observe = unobserved,
    ) -> list[tuple[int, ...]]:
        """Return the greedy continuation of each prompt, as token ids.

        Args:
            prompts: Token ids of each prompt.
            stops: Tokens that end an answer; they are part of it.
            limit: Maximum number of tokens of an answer, or one for each.
            is_complete: Returns whether an answer is complete, given its tokens; called after each step.
            drafts: A proposal for each answer, such as the answer of another model. Drafts do not change the answers;
                the tokens that a draft predicts correctly are decoded in one step.
            rules: The rules of a generation config; with any, all logits of a step are in memory.
            proposer: A model in memory that drafts the tokens that follow, unless this one is in memory too.
            observe: Receives the length of the longest answer after each step.
        """
        limits = [limit] * len(prompts) if isinstance(limit, int) else limit
        sequences = [
            _Sequence(
                prompt=prompt,
                draft=self._in_vocabulary(proposal[:most])[:-1],
                cache=self.meta_model.new_cache(),
                limit=most,
                processors=rules.processors(prompt, most, self.context.device),
            )
            for prompt, proposal, most in zip(prompts, drafts or [()] * len(prompts), limits, strict=True)
        ]
        running = sequences
        while running:
            for sequence, choices in zip(running, self._step(running), strict=True):
                self._extend(sequence, choices, stops)
            running = [
                sequence
                for sequence in running
                if len(sequence.answer) < sequence.limit
                and sequence.answer[-1] not in stops
                and not is_complete(sequence.answer)
            ]
            if proposer and not self.is_resident:
                self._draft(running, proposer)
            longest, total = max(len(sequence.answer) for sequence in sequences), max(limits)
            observe(Progress(task="answer", done=longest if running else total, total=total, unit="tokens"))
        return [tuple(sequence.answer) for sequence in sequences]

    def build(self, layer: int, take: Take) -> nn.Module:
        """Return a callable layer; keep it in memory if it is the next one to keep and fits into the budget."""
        if layer != len(self._resident) or not self._reserve(self._resident_bytes(layer)):
            return super().build(layer, take)
        self.kept = {} if self._keeps_stored else None
        module = super().build(layer, take)
        stored, self.kept = self.kept, None
        self._resident.append((lambda: module) if stored is None else lambda: self._rebuilt(layer, stored))
        return module

    def _resident_bytes(self, layer: int) -> int:
        part = self.parts[layer]
        if self._keeps_stored:
            return sum(part.checkpoint[name].nbytes for name in part.stored)
        return part.numel * self.context.dtype.itemsize

    def _rebuilt(self, layer: int, stored: Mapping[str, Tensor]) -> nn.Module:
        return super().build(layer, stored.__getitem__)

    def _draft(self, running: Sequence[_Sequence], proposer: "Decoder") -> None:
        """Let another model propose how each answer goes on."""
        known = [[*sequence.prompt, *sequence.answer] for sequence in running]
        proposals = proposer.answers(known, stops=(), limit=PROPOSED_TOKENS) if running else []
        for sequence, proposal in zip(running, proposals, strict=True):
            sequence.draft = self._in_vocabulary(proposal)[: sequence.limit - len(sequence.answer) - 1]

    def _step(self, running: Sequence[_Sequence]) -> list[list[int]]:
        """Return the model's choices for each sequence, after its last known token and each token of its draft."""
        tokens = [torch.tensor([sequence.uncached]) for sequence in running]
        inputs = [
            self.meta_model.layer_inputs(each, sequence.cache) for each, sequence in zip(tokens, running, strict=True)
        ]
        hidden = [each.hidden for each in inputs]
        resident = tuple(self._resident)
        modules = chain((module() for module in resident), self.iter_layers(len(resident)))
        for layer in range(len(self.parts)):
            hidden = _run_layer(layer, next(modules), hidden, inputs)
        counts = [1 + len(sequence.draft) for sequence in running]
        head_inputs = [
            self.meta_model.head_inputs(each[:, -count:], states[:, -count:])[0]
            for each, states, count in zip(tokens, hidden, counts, strict=True)
        ]
        states_NH = torch.cat(head_inputs)
        if not any(sequence.processors for sequence in running):
            return [choices.tolist() for choices in self._argmax(states_NH).split(counts)]
        logits = torch.cat([product(states_NH, rows_VH) for _, rows_VH in self._head_blocks()], dim=1).split(counts)
        return [sequence.choices(each).tolist() for sequence, each in zip(running, logits, strict=True)]

    def _extend(self, sequence: _Sequence, choices: Sequence[int], stops: Collection[int]) -> None:
        """Extend an answer by the part of its draft that equals the model's choices, and by one more token."""
        draft = sequence.draft
        agreed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(choices, draft, strict=False)))
        sequence.cached += len(sequence.uncached)
        if agreed < len(draft):  # states of linear attention cannot be truncated
            sequence.cache, sequence.cached = self.meta_model.new_cache(), 0
        last = next((number for number, token in enumerate(choices[:agreed]) if token in stops), agreed)
        sequence.answer += choices[: last + 1]
        sequence.draft = ()

    def _argmax(self, hidden_NH: Tensor) -> Tensor:
        """Return the token with the highest logit for each hidden state, [N]; NaN sorts highest, as in ``argmax``."""
        best_N = hidden_NH.new_full((len(hidden_NH),), -torch.inf, dtype=torch.float32)
        tokens_N = torch.zeros_like(best_N, dtype=torch.int64)
        for start, rows_VH in self._head_blocks():
            values_N, rows_N = product(hidden_NH, rows_VH).max(dim=-1)
            better_N = ~(values_N <= best_N) & ~best_N.isnan()
            best_N, tokens_N = best_N.where(~better_N, values_N), tokens_N.where(~better_N, rows_N + start)
        return tokens_N

    def _head_blocks(self) -> Iterable[tuple[int, Tensor]]:
        """Return the output head in blocks of rows, each with the number of its first row."""
        if self._head:
            return self._head
        if self._reserve(prod(self.weights.checkpoint[self.weights.head].shape) * self.context.dtype.itemsize):
            self._head = list(self.head_blocks())
        return self._head or self.head_blocks()

    def _reserve(self, nbytes: int) -> bool:
        """Reserve memory; return False if it exceeds the budget."""
        if nbytes > self._budget:
            return False
        self._budget -= nbytes
        return True

    def _in_vocabulary(self, draft: Sequence[int]) -> Sequence[int]:
        """Return a draft up to the first token outside the model's vocabulary."""
        vocabulary = self.weights.checkpoint[self.weights.embedding].rows
        return list(takewhile(lambda token: token < vocabulary, draft))


def default_budget(context: ComputeContext) -> int:
    """Return the bytes that layers may occupy on the device."""
    free = torch.cuda.mem_get_info()[0] if context.device.type == "cuda" else available_memory()
    return int(SHARE_OF_MEMORY * (free or 0))


def _run_layer(layer: int, module: nn.Module, hidden: Sequence[Tensor], inputs: Sequence[LayerInputs]) -> list[Tensor]:
    return [module(states, **each.arguments[layer]) for states, each in zip(hidden, inputs, strict=True)]
