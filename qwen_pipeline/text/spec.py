"""Settings that decide how records of text become tokens."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.text.bounded_tokenizer import LIMITS
from qwen_pipeline.text.records import BadRecord, parse_arguments
from qwen_pipeline.workers.bounded import Limits

MAX_SKIPPED = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpec:
    """Settings that decide how records become tokens.

    Attributes:
        max_skipped: Largest share of records that may be skipped because they cannot be used. Empty ones do not count.
        template_arguments: Arguments of the chat template, such as ``enable_thinking``.
        limits: Limits of the tokenizer and the chat template. They refuse, and change no token.
    """

    max_skipped: float = MAX_SKIPPED
    template_arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    limits: Limits = LIMITS

    def to_json(self) -> dict[str, Any]:
        """Return the settings that decide the tokens."""
        return {"max_skipped": self.max_skipped, "template_arguments": self.template_arguments}

    def __post_init__(self) -> None:
        if not 0 <= self.max_skipped <= 1:
            raise InputRefused(
                f"max_skipped is {self.max_skipped}, expected a share from 0 to 1.",
                remedy=f"Set max_skipped to {MAX_SKIPPED}.",
            )
        try:
            parse_arguments(self.template_arguments)
            json.dumps(self.template_arguments, allow_nan=False, ensure_ascii=False).encode()
        except (BadRecord, TypeError, ValueError) as error:
            raise InputRefused(
                f"template_arguments cannot be used: {error}.", remedy="Set only variables that the template reads."
            ) from error


DEFAULT_TEXT_SPEC = TextSpec()


def parse_template_arguments(values: Iterable[str]) -> dict[str, Any]:
    """Return ``NAME=VALUE`` arguments as a mapping; a value that is JSON is decoded.

    Raises:
        InputRefused: There is no ``=``.
    """
    arguments: dict[str, Any] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not name or not equals:
            raise InputRefused(
                f"The template argument {value!r} is not NAME=VALUE.", remedy="Pass it as enable_thinking=false."
            )
        try:
            arguments[name] = json.loads(text)
        except (ValueError, RecursionError):
            arguments[name] = text
    return arguments
