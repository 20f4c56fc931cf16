"""The rules by which a generation config changes greedy answers, as Transformers' ``generate`` applies them.

Published models have penalties in their ``generation_config.json``: ``generate(do_sample=False)`` ignores the settings
of sampling, such as ``temperature``, but not these.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as rules

from qwen_pipeline.checkpoint.files import load_json
from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.qwen.config import GENERATION_CONFIG, stop_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """The context of a rule: the prompt's tokens [1, T], the largest number of tokens after it, and the stop tokens."""

    prompt: Any  # a Tensor; Transformers' signatures ask for torch.LongTensor
    limit: int
    stops: Tensor

    @property
    def start(self) -> int:
        return self.prompt.shape[1]


_Rule = Callable[[Any, _Answer], rules.LogitsProcessor]
_RULES: Mapping[str, _Rule] = {
    "sequence_bias": lambda value, _: rules.SequenceBiasLogitsProcessor(value),
    "encoder_repetition_penalty": lambda value, answer: rules.EncoderRepetitionPenaltyLogitsProcessor(
        value, answer.prompt
    ),
    "repetition_penalty": lambda value, _: rules.RepetitionPenaltyLogitsProcessor(value),
    "no_repeat_ngram_size": lambda value, _: rules.NoRepeatNGramLogitsProcessor(value),
    "encoder_no_repeat_ngram_size": lambda value, answer: rules.EncoderNoRepeatNGramLogitsProcessor(
        value, answer.prompt
    ),
    "bad_words_ids": lambda value, answer: rules.NoBadWordsLogitsProcessor(value, answer.stops),
    "min_length": lambda value, answer: rules.MinLengthLogitsProcessor(value, answer.stops),
    "min_new_tokens": lambda value, answer: rules.MinNewTokensLengthLogitsProcessor(answer.start, value, answer.stops),
    "forced_bos_token_id": lambda value, _: rules.ForcedBOSTokenLogitsProcessor(value),
    "forced_eos_token_id": lambda value, answer: rules.ForcedEOSTokenLogitsProcessor(
        answer.start + answer.limit, value
    ),
    "remove_invalid_values": lambda _, __: rules.InfNanRemoveLogitsProcessor(),
    "exponential_decay_length_penalty": lambda value, answer: rules.ExponentialDecayLengthPenalty(
        tuple(value), answer.stops, answer.start
    ),
    "suppress_tokens": lambda value, _: rules.SuppressTokensLogitsProcessor(value),
    "begin_suppress_tokens": lambda value, answer: rules.SuppressTokensAtBeginLogitsProcessor(value, answer.start),
}
"""Setting -> the rule that it adds, in the order of ``GenerationMixin._get_logits_processor``."""
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "encoder_repetition_penalty": (1,), "repetition_penalty": (1,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "min_length": (0,), "min_new_tokens": (0,), "remove_invalid_values": (False,),
    "num_beams": (1,), "num_beam_groups": (1,), "guidance_scale": (1,), "penalty_alpha": (0,),
}  # fmt: skip
"""Setting -> values other than null that change nothing."""
_NEED_STOPS = ("min_length", "min_new_tokens", "exponential_decay_length_penalty")
_UNAPPLIED = (
    "num_beams", "num_beam_groups", "guidance_scale", "penalty_alpha", "dola_layers", "constraints", "force_words_ids",
    "stop_strings", "max_time", "watermarking_config", "token_healing",
)  # fmt: skip
"""Settings that change what ``generate`` answers in another way than by rules for the next token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyRules:
    """The rules of one generation config.

    Attributes:
        settings: Setting of :data:`_RULES` -> its value; those that change nothing are left out.
        stops: Tokens that end an answer.
        unapplied: Settings that would change answers, but are not applied.
    """

    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    stops: frozenset[int] = frozenset()
    unapplied: tuple[str, ...] = ()

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "GreedyRules":
        """Read the ``generation_config.json`` of a checkpoint.

        Raises:
            CheckpointRefused: It is not a JSON object.
        """
        file = checkpoint.sidecars.get(GENERATION_CONFIG)
        given = load_json(file) if file else {}
        stops = stop_tokens(checkpoint)
        has_effect = {
            name for name, value in given.items() if value is not None and value not in _NEUTRAL.get(name, ())
        }
        applied = [name for name in _RULES if name in has_effect and (stops or name not in _NEED_STOPS)]
        if "min_new_tokens" in applied and "min_length" in applied:
            applied.remove("min_length")
        return cls(
            settings={name: given[name] for name in applied},
            stops=stops,
            unapplied=tuple(name for name in _UNAPPLIED if name in has_effect),
        )

    def __bool__(self) -> bool:
        return bool(self.settings)

    def processors(self, prompt: Sequence[int], limit: int, device: torch.device) -> rules.LogitsProcessorList:
        """Return the rules for one answer: each changes the scores of the next token.

        Args:
            prompt: Its token ids.
            limit: Maximum number of tokens of the answer.
            device: The device of the scores.

        Raises:
            ValueError: A setting has a value that Transformers refuses.
        """
        answer = _Answer(
            prompt=torch.tensor([list(prompt)], device=device),
            limit=limit,
            stops=torch.tensor(sorted(self.stops), device=device),
        )
        return rules.LogitsProcessorList([_RULES[name](value, answer) for name, value in self.settings.items()])
