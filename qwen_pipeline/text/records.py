"""Records of text in the forms that fine-tuning tools read, each as a text or as a conversation.

The fields of a record decide its form (:data:`FORMS`): OpenAI's ``messages``, ShareGPT's ``conversations``, Alpaca's
``instruction``, and the prompt-completion and preference pairs of TRL. ``docs/text.md`` has the table.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

Fields = Mapping[str, Any]
Message = Mapping[str, Any]

FORMAT = (
    'Write one JSON object per line, such as {"text": "..."} or {"messages": [{"role": "user", "content": "..."}]};'
    " docs/text.md has all forms."
)
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Fields of a record beside its conversation that hold something else than text."""
_ONLY_TEXT = "Remove these records: models are calibrated and measured on text."
_TEXT_PARTS = ("text", "input_text", "output_text")
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bard": "assistant", "bing": "assistant", "model": "assistant", "system": "system", "observation": "tool",
    "function_response": "tool", "tool": "tool",
}  # fmt: skip
"""Speaker of ShareGPT -> role of a chat template."""
_CALL = "function_call"
_RESERVED = frozenset((
    "chat_template", "conversation", "max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict",
    "return_tensors", "sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "tools", "truncation",
))  # fmt: skip
"""Arguments of ``apply_chat_template`` that are not the template's."""


class BadRecord(Exception):
    """A record that cannot be used.

    Args:
        reason: The kind of fault, in words that are the same for all records with it.
        detail: What is particular to this record.
        remedy: What to do about all records with this fault.
    """

    def __init__(self, reason: str, detail: str = "", *, remedy: str = "Correct or remove these records.") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail.encode("utf-8", "backslashreplace").decode()[:300]  # half a surrogate cannot be printed
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class EmptyRecord(BadRecord):
    """A record of a known form that holds nothing, as a third of the rows of wikitext."""

    def __init__(self) -> None:
        super().__init__("is empty")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainText:
    """A text that the end-of-text token follows."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages for a chat template.

    Attributes:
        messages: Each with a ``role``, and a ``content`` that is a string unless there are ``tool_calls`` instead.
        tools: The JSON schemas of the tools that the template describes; None without any.
        arguments: Further arguments of the template, such as ``enable_thinking``.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A form of records.

    Attributes:
        kinds: Field -> the types of its value. A record whose filled fields include all of these has this form.
        read: Converts the record.
    """

    kinds: Mapping[str, tuple[type, ...]]
    read: Callable[[Fields], PlainText | Conversation]

    def matches(self, fields: Fields) -> bool:
        return all(isinstance(fields.get(name), kinds) for name, kinds in self.kinds.items())


def parse_record(fields: Fields) -> PlainText | Conversation:
    """Return a record's text or conversation.

    Raises:
        EmptyRecord: All fields of its form are empty or null.
        BadRecord: It has no known form, or is not complete in the form that it has.
    """
    filled = {name: value for name, value in fields.items() if value is not None and value not in ("", [], {})}
    for form in FORMS:
        if form.matches(filled):
            return form.read(filled)
    if any(form.kinds.keys() <= fields.keys() and form.kinds.keys() - filled.keys() for form in FORMS):
        raise EmptyRecord
    kinds = {name: type(value).__name__ for name, value in list(fields.items())[:12]}
    raise BadRecord("has no known form", ", ".join(f"{name!a}: {kind}" for name, kind in kinds.items()), remedy=FORMAT)


def parse_arguments(value: object) -> dict[str, Any]:
    """Return the arguments of a chat template, given as a mapping or as its JSON.

    Raises:
        BadRecord: They are not a mapping, or one of them is not the template's.
    """
    arguments = _from_json(value, "chat_template_kwargs") or {}
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise BadRecord("chat_template_kwargs is not an object", _shown(value))
    if reserved := sorted(_RESERVED & arguments.keys()):
        raise BadRecord("chat_template_kwargs has an argument that is not the template's", ", ".join(reserved))
    return dict(arguments)


def _chat(messages: Sequence[Message], fields: Fields) -> Conversation:
    if media := next((name for name in MEDIA if name in fields), None):
        raise BadRecord(f"has {media}", remedy=_ONLY_TEXT)
    arguments = parse_arguments(fields.get("chat_template_kwargs"))
    if isinstance(thinking := fields.get("enable_thinking"), bool):
        arguments = {"enable_thinking": thinking, **arguments}
    return Conversation(messages=messages, tools=_tools(fields.get("tools")), arguments=arguments)


def _openai(fields: Fields) -> Conversation:
    return _chat(list(map(_message, fields["messages"])), fields)


def _sharegpt(fields: Fields) -> Conversation:
    """Read ShareGPT's form, also with LLaMA-Factory's ``system``, and ``chosen`` as the answer of a preference pair."""
    turns = [*fields["conversations"], *([fields["chosen"]] if isinstance(fields.get("chosen"), Mapping) else [])]
    return _chat([*_system(fields), *map(_turn, turns)], fields)


def _alpaca(fields: Fields) -> Conversation:
    """Read Alpaca's form as LLaMA-Factory does: the input follows the instruction in a line of its own."""
    question = "\n".join(_string(fields, name) for name in ("instruction", "input") if name in fields)
    turns = [*_history(fields.get("history", [])), question, fields.get("output") or _string(fields, "chosen")]
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(turns)]
    return _chat([*_system(fields), *messages], fields)


def _prompted(fields: Fields) -> PlainText | Conversation:
    """Read a prompt and its completion, or the chosen one of two; both are texts or both are lists of messages.

    As TRL's ``extract_prompt`` assumes, chosen messages without a list of messages before them are the conversation.
    """
    answer = fields.get("completion") or fields["chosen"]
    prompt = fields.get("prompt", type(answer)())
    if isinstance(prompt, str) and isinstance(answer, str):
        return PlainText(text=prompt + answer)
    if isinstance(prompt, list) and isinstance(answer, list):
        return _chat(list(map(_message, [*prompt, *answer])), fields)
    if isinstance(prompt, str) and "chosen" in fields and isinstance(answer, list):
        return _chat(list(map(_message, cast("list[object]", answer))), fields)
    raise BadRecord("has a prompt and an answer of different types")


def _text(fields: Fields) -> PlainText:
    return PlainText(text=fields["text"])


_EITHER = (str, list)
FORMS = (
    Form(kinds={"messages": (list,)}, read=_openai),
    Form(kinds={"text": (str,)}, read=_text),
    Form(kinds={"conversations": (list,)}, read=_sharegpt),
    Form(kinds={"prompt": _EITHER, "completion": _EITHER}, read=_prompted),
    Form(kinds={"instruction": (str,), "output": (str,)}, read=_alpaca),
    Form(kinds={"instruction": (str,), "chosen": (str,)}, read=_alpaca),
    Form(kinds={"chosen": _EITHER}, read=_prompted),
)
"""The forms of records; the first that matches counts."""
FIELDS = frozenset((
    *(name for form in FORMS for name in form.kinds),
    *MEDIA, "chat_template_kwargs", "enable_thinking", "history", "input", "prompt", "system", "tools",
))  # fmt: skip
"""All fields that are read."""


def _message(value: object) -> Message:
    """Check a message, and join the text parts of its content."""
    message = _mapping(value, "a message")
    if "role" not in message and "from" in message:
        return _turn(message)
    if not isinstance(message.get("role"), str):
        raise BadRecord("a message has no role", _shown(message))
    content = message.get("content")
    if isinstance(content, str):
        return message
    if isinstance(content, list):
        return {**message, "content": "".join(map(_part, cast("list[object]", content)))}
    if content is None and (message.get("tool_calls") or message.get("reasoning_content")):
        return message
    raise BadRecord("a message has no content" if content is None else "a message's content is not text", _shown(value))


def _turn(value: object) -> Message:
    """Convert a turn of ShareGPT to a message."""
    turn = _mapping(value, "a turn")
    if "role" in turn:
        return _message(turn)
    speaker, text = turn.get("from"), turn.get("value")
    if not isinstance(text, str):
        raise BadRecord("a turn has no text", _shown(turn))
    if speaker == _CALL:
        return {"role": "assistant", "tool_calls": list(_calls(text))}
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise BadRecord("a turn has an unknown speaker", _shown(speaker))
    return {"role": _ROLES[speaker], "content": text}


def _calls(text: str) -> Iterator[Mapping[str, Any]]:
    value = _from_json(text, _CALL)
    for call in cast("list[object]", value) if isinstance(value, list) else [value]:
        function = _mapping(call, _CALL)
        if not isinstance(function.get("name"), str):
            raise BadRecord(f"{_CALL} names no function", _shown(text))
        yield {"type": "function", "function": function}


def _part(value: object) -> str:
    part: Fields = {"text": value} if isinstance(value, str) else _mapping(value, "a part of a message")
    kind, text = part.get("type", "text" if "text" in part else next(iter(part), "?")), part.get("text")
    if kind not in _TEXT_PARTS:
        raise BadRecord(f"a message has a part of type {_shown(kind)}", remedy=_ONLY_TEXT)
    if not isinstance(text, str):
        raise BadRecord("a part of a message has no text", _shown(part))
    return text


def _tools(value: object) -> Sequence[Mapping[str, Any]] | None:
    value = _from_json(value, "tools")
    if not value:
        return None
    tools = cast("list[object]", value) if isinstance(value, list) else [value]
    return [_mapping(tool, "a tool") for tool in tools]


def _system(fields: Fields) -> list[Message]:
    return [{"role": "system", "content": _string(fields, "system")}] if "system" in fields else []


def _history(value: object) -> list[str]:
    """Return the texts of a list of pairs, one after the other."""
    pairs = cast("list[object]", value) if isinstance(value, list) else [value]
    texts = [text for pair in pairs if isinstance(pair, list) and len(pair) == 2 for text in cast("list[object]", pair)]
    if len(texts) != 2 * len(pairs) or not all(isinstance(text, str) for text in texts):
        raise BadRecord("history is not a list of pairs of texts", _shown(value))
    return cast("list[str]", texts)


def _string(fields: Fields, name: str) -> str:
    if not isinstance(value := fields[name], str):
        raise BadRecord(f"{name} is not a text", _shown(value))
    return value


def _mapping(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BadRecord(f"{name} is not an object", _shown(value))
    return cast("Mapping[str, Any]", value)


def _from_json(value: object, name: str) -> object:
    """Return a value, decoded if it is a JSON text, as which datasets store what differs from row to row."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{name} is not valid JSON", str(error)) from error


def _shown(value: object) -> str:
    return ascii(value)[:80]
