"""Answers to sample prompts, and the detection of degenerate answers, which broken quantized models give."""

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
"""Three prompts of fewer than 50 tokens and one of more: some engines switch kernels there, and one may be faulty."""
MAX_NEW_TOKENS = 48
MAX_PHRASE_WORDS = 12
MIN_REPEATS = 4
MIN_RUN = 8
RULERS = tuple(".-=_*#")
"""Characters of rulers, headings and ellipses: their repetition is not a fault."""
_RUN = re.compile(rf"([^\s{re.escape(''.join(RULERS))}])\1{{{MIN_RUN - 1},}}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A greedy answer: its text without special tokens, its token ids, and whether a stop token ended it."""

    text: str
    tokens: Sequence[int]
    ended: bool

    @property
    def degeneration(self) -> str | None:
        """The way in which the answer is degenerate, or None."""
        return degeneration(self.text) or _repetition(self.tokens[:-1] if self.ended else self.tokens, self.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt and two models' greedy answers to it; None if a model did not load or answer."""

    prompt: str
    reference: Completion | None
    candidate: Completion | None

    @property
    def agreed_tokens(self) -> int:
        """The number of equal tokens at the start of both answers."""
        return agreed_length(self.reference.tokens, self.candidate.tokens) if self.reference and self.candidate else 0

    @property
    def tokens(self) -> int:
        """The number of tokens in the longer answer."""
        return max(len(answer.tokens) if answer else 0 for answer in (self.reference, self.candidate))

    @property
    def agreed_characters(self) -> int:
        """The number of equal characters at the start of both answers."""
        return agreed_length(self.reference.text, self.candidate.text) if self.reference and self.candidate else 0

    @property
    def fault(self) -> str | None:
        """A fault of the candidate's answer that the reference's answer does not have, or None."""
        reference, candidate = self.reference, self.candidate
        if candidate is None or (reference is not None and reference.degeneration):
            return None
        if reference and reference.ended and not candidate.ended:
            ended, running = len(reference.tokens), len(candidate.tokens)
            if 2 * ended <= running:
                return f"has not ended after {running} tokens, while the merged model's ended after {ended}"
        return candidate.degeneration


def degeneration(text: str) -> str | None:
    """Return the way in which a text is degenerate, or None.

    A degenerate text is empty, contains a run of one character (the ``!!!!`` of kernels that overflow), or ends with a
    phrase of up to :data:`MAX_PHRASE_WORDS` words that is repeated :data:`MIN_REPEATS` times or more.
    """
    if not text.strip():
        return "is empty"
    if run := _RUN.search(text):
        return f"contains {run[1]!r} {len(run[0])} times in a row"
    words = text.split()
    for length in range(1, MAX_PHRASE_WORDS + 1):
        phrase = words[-length:]
        repeats = 1
        while words[-length * (repeats + 1) : -length * repeats] == phrase:
            repeats += 1
        if repeats >= MIN_REPEATS:
            return f"ends with {' '.join(phrase)!r} repeated {repeats} times"
    return None


def _repetition(tokens: Sequence[int], text: str) -> str | None:
    """Return the way in which the last tokens repeat, such as special tokens, or None; rulers may repeat."""
    for length in range(1, MAX_PHRASE_WORDS + 1):
        period = tokens[-length:]
        repeats = 1
        while period and tokens[-length * (repeats + 1) : -length * repeats] == period:
            repeats += 1
        ruler = len(set(period)) == 1 and text.rstrip()[-1:] in RULERS
        if repeats >= MIN_REPEATS and repeats * length >= MIN_RUN and not ruler:
            return (
                f"ends with {'the same token' if length == 1 else f'the same {length} tokens'} repeated {repeats} times"
            )
    return None


def agreed_length(first: Sequence[object], second: Sequence[object]) -> int:
    """Return the length of the common prefix of two sequences."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
