"""A layer-streamed checkpoint as a model of lm-eval. Imported only under the Python of lm-eval's environment.

The requests of all tasks go through a layer together before the next layer is read, so that a model needs the memory
of one layer and of the hidden states. Every family is supported, including packed experts. Tokenization and the end of
answers follow lm-eval's own ``HFLM``.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from qwen_pipeline.evaluation.logits.likelihood import Continuation, Likelihood, log_likelihoods
from qwen_pipeline.layerwise.decoding import Decoder
from qwen_pipeline.layerwise.greedy_rules import GreedyRules
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.models.open import open_model
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.qwen.config import stop_tokens
from qwen_pipeline.text.tokenizers import load_tokenizer

ANSWER_TOKENS = 256
"""Default maximum number of tokens in an answer, as in HFLM."""
ANSWERS = 16
"""Answers that are decoded together; each has its own key-value cache."""
_IRRELEVANT = {"do_sample", "temperature", "top_k", "top_p"}
"""Arguments that do not affect greedy answers."""

Pair = tuple[list[int], list[int]]
"""Token ids of a context and of its continuation."""


class StreamedLM(TemplateLM):  # pyright: ignore[reportUntypedBaseClass]
    """A model of lm-eval that scores continuations and answers greedily; its checkpoint may be a recipe.

    Args:
        root: The directory of the checkpoint and its tokenizer.
        context: Device and dtype of the computation.
        observe: Called for each layer, and for each token of answers.

    Raises:
        InputRefused: The checkpoint has no tokenizer.
        CheckpointRefused: The checkpoint cannot be read.
    """

    def __init__(self, root: Path, context: ComputeContext, *, observe: Observe = unobserved) -> None:
        from transformers import AutoConfig

        super().__init__()
        self.tokenizer: Any = load_tokenizer(root)
        self.max_length: int = resolve_max_length(
            AutoConfig.from_pretrained(root, local_files_only=True), self.tokenizer
        )
        self._model, self._context, self._observe = open_model(root), context, observe

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        """Return the log-likelihood of each whole text, over disjoint windows as in lm-eval."""
        windows = [self._windows(*request.args) for request in requests]
        found = iter(self._likelihoods([pair for each in windows for pair in each]))
        return [sum(one.log for one in islice(found, len(each))) for each in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        """Return greedy answers, each up to its first stop sequence.

        Raises:
            ValueError: A task needs answers that are not greedy.
        """
        by_arguments: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_arguments.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        decoder, found = Decoder(self._model, self._context), dict[int, str]()
        for arguments, numbers in by_arguments.items():
            for start in range(0, len(numbers), ANSWERS):
                batch = numbers[start : start + ANSWERS]
                contexts = [requests[number].args[0] for number in batch]
                found |= zip(batch, self._answers(decoder, contexts, json.loads(arguments)), strict=True)
        return [found[number] for number in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        found = self._likelihoods([(context, continuation) for _, context, continuation in requests])
        return [(one.log, one.greedy) for one in found]

    def _likelihoods(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        """Score continuations; if a pair is too long, the beginning of the context is dropped."""
        continuations = [
            Continuation(tokens=tuple([*context, *continuation][-self.max_length - 1 :]), scored=len(continuation))
            for context, continuation in pairs
        ]
        return log_likelihoods(self._model, continuations, self._context, observe=self._observe)

    def _windows(self, text: str) -> list[Pair]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [make_disjoint_window(window) for window in windows]

    def _answers(self, decoder: Decoder, contexts: Sequence[str], arguments: Mapping[str, Any]) -> list[str]:
        options = normalize_gen_kwargs(dict(arguments), ANSWER_TOKENS)
        stops = handle_stop_sequences(options.pop("until"), eos=self.tokenizer.decode(self.eot_token_id))
        limit = options.pop("max_gen_toks")
        if unsupported := sorted(options.keys() - _IRRELEVANT) + ["do_sample"] * options["do_sample"]:
            raise ValueError(
                f"a task needs answers with {', '.join(unsupported)}, but only greedy answers are supported"
            )
        if limit >= self.max_length:
            raise ValueError(f"a task needs answers of {limit} tokens, but the model's context has {self.max_length}")
        answers = decoder.answers(
            [self.tok_encode(context)[limit - self.max_length :] for context in contexts],
            stops={*stop_tokens(self._model), self.eot_token_id},
            is_complete=lambda tokens: any(stop in self.tokenizer.decode(tokens) for stop in stops),
            limit=limit,
            rules=GreedyRules.of(self._model),
            observe=self._observe,
        )
        texts = self.tokenizer.batch_decode([list(tokens) for tokens in answers], skip_special_tokens=True)
        return [postprocess_generated_text(text, stop=stops, think_end_token=None) for text in texts]
