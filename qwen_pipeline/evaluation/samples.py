"""Answers to a few prompts, and whether they are broken in the ways that broken quantized models break."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

DEFAULT_PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences what a list is in Python.",
    "Write one short sentence about the sea.",
    "A farmer has seventeen sheep. All but nine of them run away over the hill in the night, and in the morning a"
    " neighbour brings three of the runaways back, while two lambs are born in the barn. Count step by step how many"
    " animals the farmer has at noon, and end with the number.",
)
"""Three of fewer than 50 tokens and one of more: some kernels change with that number, and some err on one side."""
MAX_NEW_TOKENS = 48
MAX_PHRASE_WORDS = 12
MIN_REPEATS = 4
MIN_RUN = 8
RULERS = tuple(".-=_*#")
"""Rulers, headings and ellipses are made of them: in a row they are no fault."""
_RUN = re.compile(rf"([^\s{re.escape(''.join(RULERS))}])\1{{{MIN_RUN - 1},}}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A greedy answer: its text without special tokens, its token ids, and whether a stop token ended it."""

    text: str
    tokens: Sequence[int]
    ended: bool

    @property
    def degeneration(self) -> str | None:
        """How the answer is degenerate, if it is."""
        return degeneration(self.text) or _repetition(self.tokens[:-1] if self.ended else self.tokens, self.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt and two models' greedy answers to it; None where a model did not load or answer."""

    prompt: str
    reference: Completion | None
    candidate: Completion | None

    @property
    def agreed_tokens(self) -> int:
        """How many tokens both answers start with; from there on they have different histories."""
        return agreed_length(self.reference.tokens, self.candidate.tokens) if self.reference and self.candidate else 0

    @property
    def tokens(self) -> int:
        """How many tokens the longer answer has."""
        return max(len(answer.tokens) if answer else 0 for answer in (self.reference, self.candidate))

    @property
    def agreed_characters(self) -> int:
        """How many characters both answers start with."""
        return agreed_length(self.reference.text, self.candidate.text) if self.reference and self.candidate else 0

    @property
    def fault(self) -> str | None:
        """What is wrong with the candidate's answer but not with the reference's."""
        reference, candidate = self.reference, self.candidate
        if candidate is None or (reference is not None and reference.degeneration):
            return None
        if reference and reference.ended and not candidate.ended:
            ended, running = len(reference.tokens), len(candidate.tokens)
            if 2 * ended <= running:
                return f"runs on at {running} tokens, where the merged model's ended after {ended}"
        return candidate.degeneration


def degeneration(text: str) -> str | None:
    """Say how a text is degenerate, or return None.

    It is when it is empty, holds a run of one character (the ``!!!!`` of kernels that overflow), or ends in one phrase
    of up to :data:`MAX_PHRASE_WORDS` words said :data:`MIN_REPEATS` times or more.
    """
    if not text.strip():
        return "is empty"
    if run := _RUN.search(text):
        return f"has a run of {len(run[0])} times {run[1]!r}"
    words = text.split()
    for length in range(1, MAX_PHRASE_WORDS + 1):
        phrase = words[-length:]
        repeats = 1
        while words[-length * (repeats + 1) : -length * repeats] == phrase:
            repeats += 1
        if repeats >= MIN_REPEATS:
            return f"ends in {' '.join(phrase)!r} said {repeats} times"
    return None


def _repetition(tokens: Sequence[int], text: str) -> str | None:
    """Say how tokens repeat themselves at the end, as texts without spaces and special tokens do; rulers may."""
    for length in range(1, MAX_PHRASE_WORDS + 1):
        period = tokens[-length:]
        repeats = 1
        while period and tokens[-length * (repeats + 1) : -length * repeats] == period:
            repeats += 1
        ruler = len(set(period)) == 1 and text.rstrip()[-1:] in RULERS
        if repeats >= MIN_REPEATS and repeats * length >= MIN_RUN and not ruler:
            return f"ends in {'the same token' if length == 1 else f'the same {length} tokens'}, {repeats} times over"
    return None


def agreed_length(first: Sequence[object], second: Sequence[object]) -> int:
    """Return how long the beginning is that two sequences share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
