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
_RUN = re.compile(r"([^\s.\-=_*#])\1{7,}")
"""One character eight times in a row; not what rulers, headings and ellipses are made of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A greedy answer: its text without special tokens, its token ids, and whether the model ended it by itself."""

    text: str
    tokens: Sequence[int]
    ended: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt and two models' greedy answers to it; None where a model did not load."""

    prompt: str
    reference: Answer | None
    candidate: Answer | None

    @property
    def agreed_tokens(self) -> int:
        """How many tokens both answers start with; from there on they have different histories."""
        return agreed_length(self.reference.tokens, self.candidate.tokens) if self.reference and self.candidate else 0

    @property
    def agreed_characters(self) -> int:
        """How many characters both answers start with."""
        return agreed_length(self.reference.text, self.candidate.text) if self.reference and self.candidate else 0

    @property
    def fault(self) -> str | None:
        """What is wrong with the candidate's answer but not with the reference's."""
        reference, candidate = self.reference, self.candidate
        if candidate is None or (reference is not None and degeneration(reference.text)):
            return None
        if reference and reference.ended and not candidate.ended:
            ended, running = len(reference.tokens), len(candidate.tokens)
            if 2 * ended <= running:
                return f"runs on at {running} tokens, where the merged model's ended after {ended}"
        return degeneration(candidate.text)


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


def agreed_length(first: Sequence[object], second: Sequence[object]) -> int:
    """Return how long the beginning is that two sequences share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
