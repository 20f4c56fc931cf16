"""The answers of both models to the same requests, and what each of them is worth to a program that reads it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from qwen_pipeline.evaluation.behaviour.requests import JSON_KEYS, TOOLS
from qwen_pipeline.evaluation.behaviour.tool_calls import fault_of_call, tool_calls

Kind = Literal["tool call", "thinking", "JSON", "needle"]
OPENED, CLOSED = "<think>", "</think>"
_FENCE = "```"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One model's greedy answer.

    Attributes:
        text: Its text without special tokens.
        tokens: Number of its tokens.
        ended: Whether a stop token ended it.
        thought: Number of tokens up to the end of its thought; None if no thought ended.
    """

    text: str
    tokens: int
    ended: bool
    thought: int | None = None

    @property
    def visible(self) -> str:
        """The text after a thought."""
        return self.text.rpartition(CLOSED)[2].strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """A request, and both models' answers; None if a model did not load or answer.

    Attributes:
        kind: What the answer has to be.
        request: The request as text, without what surrounds a needle.
        prompt_tokens: Number of tokens of the prompt.
        expected: The needle.
    """

    kind: Kind
    request: str
    prompt_tokens: int
    merged: Reply | None
    quantized: Reply | None
    expected: str = ""

    def value(self, reply: Reply | None) -> Any:
        """Return the value of an answer for a program: calls as text, the object, the needle; None for nothing."""
        if reply is None:
            return None
        match self.kind:
            case "tool call":
                calls = tool_calls(reply.visible)
                return None if not calls or _fault_of(reply) else tuple(map(str, calls))
            case "JSON":
                return json_object(reply.visible)
            case "needle":
                return self.expected if self.expected in reply.visible else None
            case "thinking":
                return reply.thought

    def words(self, reply: Reply | None) -> str:
        """Return an answer's value in a few words, or what is wrong with it."""
        if reply is None:
            return "no answer"
        match self.kind:
            case "tool call":
                calls = tool_calls(reply.visible)
                return (
                    "a call that cannot be read"
                    if calls is None
                    else _fault_of(reply) or "; ".join(map(str, calls)) or "no call"
                )
            case "JSON":
                value = json_object(reply.visible)
                return "no such object" if value is None else json.dumps(value, ensure_ascii=False)
            case "needle":
                return "found" if self.value(reply) else "not found"
            case "thinking":
                return f"not closed in {reply.tokens} tokens" if reply.thought is None else f"{reply.thought} tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """Findings about the answers to all requests.

    Attributes:
        exchanges: The requests with both models' answers.
        left_out: Kind -> the reason why there is no, or no further, request of it.
        faults: Model -> the reason why it did not answer.
        turn_end: The token with which the chat template ends an answer; None without a template.
        stops: The quantized model's stop tokens.
    """

    exchanges: Sequence[Exchange] = ()
    left_out: Mapping[str, str] = field(default_factory=dict[str, str])
    faults: Mapping[str, str] = field(default_factory=dict[str, str])
    turn_end: int | None = None
    stops: Sequence[int] = ()

    def of_kind(self, kind: Kind) -> list[Exchange]:
        return [exchange for exchange in self.exchanges if exchange.kind == kind]


def json_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object that a text is, in a block of code or not, if it has all the keys that were asked for."""
    inner = text.strip().removeprefix(_FENCE).removeprefix("json").removesuffix(_FENCE) if _FENCE in text else text
    try:
        value: Any = json.loads(inner)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    found = cast("dict[str, Any]", value)
    return found if found.keys() >= set(JSON_KEYS) else None


def _fault_of(reply: Reply) -> str | None:
    calls = tool_calls(reply.visible) or []
    return next((fault for call in calls if (fault := fault_of_call(call, TOOLS))), None)
