"""Write the requests as token ids by the model's own chat template, and read both models' answers."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.behaviour.findings import CLOSED, OPENED, Behaviour, Exchange, Kind, Reply
from qwen_pipeline.evaluation.behaviour.plan import BehaviourPlan
from qwen_pipeline.evaluation.behaviour.requests import (
    CALLS,
    EXAMPLE_CALL,
    NEEDLE,
    NEEDLE_CODE,
    NEEDLE_QUESTION,
    NEEDLE_TOKENS,
    OBJECTS,
    THOUGHTS,
    TOOLS,
)
from qwen_pipeline.evaluation.behaviour.tool_calls import ToolCall, as_text, tool_calls
from qwen_pipeline.evaluation.figures import ModelFigures
from qwen_pipeline.evaluation.findings import MERGED, QUANTIZED
from qwen_pipeline.text.records import BadRecord, Conversation, Message
from qwen_pipeline.text.tokenizers import Tokenizer

_ANSWERING = {"add_generation_prompt": True}
_THINKING = "enable_thinking"
_USER: Message = {"role": "user", "content": "Hello"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt, the number of tokens that its answer may have, and what the answer has to be."""

    kind: Kind
    text: str
    tokens: Sequence[int]
    limit: int
    expected: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """The requests for a model, and what is found out while they are written.

    Attributes:
        asked: The requests.
        left_out: As in :class:`~qwen_pipeline.evaluation.behaviour.findings.Behaviour`.
        turn_end: Likewise.
    """

    asked: Sequence[Request] = ()
    left_out: Mapping[str, str] = field(default_factory=dict[str, str])
    turn_end: int | None = None


class Asking:
    """The chat template of a model.

    Args:
        tokenizer: The merged model's tokenizer.
        arguments: Arguments of the chat template.
    """

    def __init__(self, tokenizer: Tokenizer, arguments: Mapping[str, Any]) -> None:
        self._tokenizer, self._arguments = tokenizer, arguments

    def requests(self, plan: BehaviourPlan, windows: Sequence[Sequence[int]], *, positions: int | None) -> Requests:
        """Return the requests of a plan; those that the model is not made for are named with the reason.

        Args:
            plan: Lengths of requests and answers.
            windows: Token ids of held-out text, in which needles are hidden.
            positions: Number of positions that the model has.
        """
        kinds: dict[Kind, Iterator[Request | str]] = {
            "tool call": self._calls(plan.tokens),
            "thinking": self._thoughts(plan.thinking_tokens),
            "JSON": self._plain("JSON", OBJECTS if plan.tokens else (), plan.tokens),
            "needle": self._needles(plan.needles, [token for window in windows for token in window], positions),
        }
        try:
            turn_end = self._turn_end()
            found = {kind: [_within(positions, each) for each in requests] for kind, requests in kinds.items()}
        except (InputRefused, BadRecord) as refused:
            reason = refused.what if isinstance(refused, InputRefused) else f"The chat template refuses it: {refused}."
            return Requests(left_out=dict.fromkeys(kinds, reason))
        return Requests(
            asked=[each for requests in found.values() for each in requests if isinstance(each, Request)],
            left_out={
                kind: " ".join(reasons) or "No such request is configured."
                for kind, requests in found.items()
                if (reasons := [each for each in requests if isinstance(each, str)]) or not requests
            },
            turn_end=turn_end,
        )

    def _encode(self, messages: Sequence[Message], tools: Any = None, **arguments: Any) -> list[int]:
        conversation = Conversation(messages=messages, tools=tools)
        return self._tokenizer.encode(conversation, where="A request", arguments={**self._arguments, **arguments})

    def _asked(self, text: str, tools: Any = None, **arguments: Any) -> list[int]:
        """Return a prompt; unless thinking is asked for, an answer comes at once where the template can say so."""
        given = {_THINKING: self._arguments.get(_THINKING, False)} | arguments
        return self._encode([{"role": "user", "content": text}], tools, **given, **_ANSWERING)

    def _plain(self, kind: Kind, texts: Sequence[str], limit: int) -> Iterator[Request]:
        for text in texts:
            yield Request(kind=kind, text=text, tokens=self._asked(text), limit=limit)

    def _calls(self, limit: int) -> Iterator[Request | str]:
        if not limit:
            return
        if self._asked(CALLS[0], TOOLS) == self._asked(CALLS[0]):
            yield "The chat template does not offer tools to the model."
        elif not self._writes_known_calls():
            yield "The chat template writes tool calls in a way that is not known here."
        else:
            for text in CALLS:
                yield Request(kind="tool call", text=text, tokens=self._asked(text, TOOLS), limit=limit)

    def _writes_known_calls(self) -> bool:
        """Return whether a call that the template writes is read back as the same call."""
        name, arguments = EXAMPLE_CALL
        called = {"type": "function", "function": {"name": name, "arguments": arguments}}
        said: Message = {"role": "assistant", "content": "", "tool_calls": [called]}
        before, after = self._encode([_USER]), self._encode([_USER, said])
        start = next((n for n, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), len(before))
        call = ToolCall(name=name, arguments=arguments)
        return tool_calls(self._tokenizer.decode(after[start:])) in ([call], [as_text(call)])

    def _thoughts(self, limit: int) -> Iterator[Request | str]:
        if not limit:
            return
        for text in THOUGHTS:
            tokens = self._asked(text, **{_THINKING: True})
            last = self._tokenizer.decode(tokens).rpartition(OPENED)
            is_open = bool(last[1]) and CLOSED not in last[2]
            if not is_open and tokens == self._asked(text, **{_THINKING: False}):
                yield "The chat template has no thinking."
                return
            yield Request(kind="thinking", text=text, tokens=tokens, limit=limit)

    def _needles(self, lengths: Sequence[int], text: Sequence[int], positions: int | None) -> Iterator[Request | str]:
        for length in lengths:
            if reason := _beyond(positions, length + NEEDLE_TOKENS):
                yield reason
                continue
            tokens = self._needle(length, list(islice(cycle(text), length)))
            yield Request(kind="needle", text=NEEDLE_QUESTION, tokens=tokens, limit=NEEDLE_TOKENS, expected=NEEDLE_CODE)

    def _needle(self, length: int, text: Sequence[int]) -> list[int]:
        """Return a prompt of at most ``length`` tokens: text, the needle in its middle, and the question at its end."""
        needle = NEEDLE.format(code=NEEDLE_CODE)
        rest = max(length - len(self._asked(f"\n\n{needle}\n\n{NEEDLE_QUESTION}")), 0)
        while True:
            parts = (text[: rest // 2], text[rest // 2 : rest])
            before, after = (self._tokenizer.decode(part).replace(NEEDLE_CODE, "") for part in parts)
            tokens = self._asked(f"{before}\n{needle}\n{after}\n\n{NEEDLE_QUESTION}")
            if len(tokens) <= length or not rest:
                return tokens
            rest = min(rest - 1, rest * length // len(tokens))

    def _turn_end(self) -> int | None:
        """Return the first of the tokens with which the template ends every answer."""
        short, long = ([_USER, {"role": "assistant", "content": text}] for text in ("Yes", "Yes, no"))
        ends = list(zip(*(reversed(self._encode(messages)) for messages in (short, long)), strict=False))
        equal = next((number for number, (one, other) in enumerate(ends) if one != other), 0)
        tokens = [token for token, _ in ends[:equal]]
        return tokens[-1] if tokens else None


def behaviour_of(
    requests: Requests, figures: Mapping[str, ModelFigures], stops: Mapping[str, Collection[int]], tokenizer: Tokenizer
) -> Behaviour:
    """Return the findings about the answers.

    Args:
        requests: The requests.
        figures: Role -> figures with the answers, in the order of the requests.
        stops: Role -> stop tokens.
        tokenizer: The merged model's tokenizer.
    """
    closing = tokenizer.encode_text(CLOSED, add_special_tokens=False) if requests.asked else []
    left_out = dict(requests.left_out)
    exchanges: list[Exchange] = []
    for number, request in enumerate(requests.asked):
        answers = {role: found.replies[number] for role, found in figures.items() if found.replies}
        if any(not answer for answer in answers.values()):
            reason = f"{len(request.tokens):,} tokens do not fit into memory."
            left_out[request.kind] = f"{left_out.get(request.kind, '')} {reason}".strip()
            continue
        replies = {
            role: Reply(
                text=tokenizer.decode(answer),
                tokens=len(answer),
                ended=answer[-1] in stops[role],
                thought=_end_of(closing, answer),
            )
            for role, answer in answers.items()
        }
        exchanges.append(
            Exchange(
                kind=request.kind,
                request=request.text,
                prompt_tokens=len(request.tokens),
                expected=request.expected,
                merged=replies.get(MERGED),
                quantized=replies.get(QUANTIZED),
            )
        )
    return Behaviour(
        exchanges=exchanges,
        left_out=left_out,
        faults={role: found.unreplied for role, found in figures.items() if found.unreplied},
        turn_end=requests.turn_end,
        stops=sorted(stops[QUANTIZED]),
    )


def _within(positions: int | None, request: Request | str) -> Request | str:
    if isinstance(request, str):
        return request
    return _beyond(positions, len(request.tokens) + request.limit) or request


def _beyond(positions: int | None, tokens: int) -> str | None:
    if positions is None or tokens <= positions:
        return None
    return f"The model has {positions:,} positions, and request and answer may have {tokens:,} tokens."


def _end_of(part: Sequence[int], tokens: Sequence[int]) -> int | None:
    """Return the number of tokens up to the end of the first occurrence of a part of them; None if there is none."""
    ends = range(len(part), len(tokens) + 1)
    return next((end for end in ends if list(tokens[end - len(part) : end]) == list(part)), None)
