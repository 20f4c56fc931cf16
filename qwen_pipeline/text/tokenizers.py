"""Tokenizers of checkpoints, and the token ids of records and prompts."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from qwen_pipeline.checkpoint.files import load_json
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.text.records import BadRecord, Conversation, Message, PlainText, parse_record

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Files of which a tokenizer needs one."""
_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.json"
MAX_TEMPLATE = 1_000_000
"""The longest chat template that is compiled, in characters; those of Qwen have up to 10,000."""
MAX_ADDED = 200_000
"""The largest number of added tokens, of which each costs the time of a search."""
_SLACK, _EXPANSION = 1_000_000, 100
"""A chat template may make so many characters, or so many times the characters of the record."""
_NOTHING: Mapping[str, Any] = {}
_PROBE = [{"role": "user", "content": "?"}]
_ARGUMENTS = {"key": "value"}
_T = TypeVar("_T")


class Tokenizer(Protocol):
    """The tokenizer of a checkpoint.

    Attributes:
        pad_token: The token that fills windows.
    """

    @property
    def pad_token(self) -> int: ...
    def encode(self, record: PlainText | Conversation, *, where: str, arguments: Mapping[str, Any] = ...) -> list[int]:
        """Return the token ids of a record: see :func:`encode_record`."""
        ...

    def encode_prompt(self, prompt: str, *, arguments: Mapping[str, Any] = ...) -> list[int]:
        """Return the token ids of a prompt: see :func:`encode_prompt`."""
        ...

    def encode_text(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        ...


def load_tokenizer(checkpoint: Path) -> Any:
    """Load the tokenizer in a checkpoint's directory.

    A chat template in ``chat_template.json``, where processors of vision models had it, is used if there is no other.

    Raises:
        InputRefused: There is no tokenizer, or it cannot be loaded.
    """
    from transformers import AutoTokenizer  # takes a second to import

    _require_readable(checkpoint)
    try:
        tokenizer = _guarded(
            lambda: cast("Any", AutoTokenizer).from_pretrained(
                checkpoint, local_files_only=True, trust_remote_code=False
            )
        )
        if not tokenizer.chat_template and (checkpoint / _TEMPLATE).is_file():
            tokenizer.chat_template = load_json(checkpoint / _TEMPLATE).get("chat_template")
        _require_short(tokenizer.chat_template, checkpoint)
        _ = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id, tokenizer.pad_token_id
    except (InputRefused, MemoryError):
        raise
    except Exception as error:
        raise InputRefused(
            f"{checkpoint} has no tokenizer that can be loaded: {type(error).__name__}: {_first_lines(error)}",
            remedy=f"Copy the tokenizer's files ({VOCABULARIES[0]} and {_CONFIG}) from the model that was fine-tuned,"
            " or save them again with save_pretrained of the Transformers that wrote them.",
        ) from error
    return tokenizer


def _require_short(template: object, checkpoint: Path) -> None:
    """Refuse a chat template that would take minutes to compile; there may be several, by name."""
    for each in template.values() if isinstance(template, dict) else [template]:
        if (length := len(str(each or ""))) > MAX_TEMPLATE:
            raise InputRefused(
                f"The chat template of {checkpoint} has {length:,} characters, but at most {MAX_TEMPLATE:,} are read.",
                remedy="Copy the chat template from the model that was fine-tuned.",
            )


def _require_readable(checkpoint: Path) -> None:
    """Refuse a directory without a vocabulary, and files that are not JSON, by their name."""
    if not any((checkpoint / name).is_file() for name in VOCABULARIES):
        raise InputRefused(
            f"{checkpoint} has no tokenizer: there is none of {', '.join(VOCABULARIES)}.",
            remedy="Copy the tokenizer's files from the model that was fine-tuned into the directory.",
        )
    for name in ("tokenizer.json", _CONFIG, "special_tokens_map.json", "added_tokens.json", _TEMPLATE):
        if (checkpoint / name).is_file():
            content = load_json(checkpoint / name, refused=InputRefused)
            added = content.get("added_tokens") or content.get("added_tokens_decoder") or ()
            if isinstance(added, list | dict) and len(cast("Sequence[Any]", added)) > MAX_ADDED:
                raise InputRefused(
                    f"{checkpoint / name} has {len(cast('Sequence[Any]', added)):,} added tokens, but at most"
                    f" {MAX_ADDED:,} are read.",
                    remedy="Copy the tokenizer's files from the model that was fine-tuned.",
                )


def encode_record(
    fields: Mapping[str, Any], tokenizer: Any, *, where: str, arguments: Mapping[str, Any] = _NOTHING
) -> list[int]:
    """Return a record's token ids: of a text and the end-of-text token, or of a conversation in the chat template.

    Args:
        fields: The record.
        tokenizer: The checkpoint's tokenizer.
        where: The location of the record, for error messages.
        arguments: Arguments of the chat template; those of the record itself count more.

    Raises:
        BadRecord: The record cannot be used.
        InputRefused: It is a conversation, and the tokenizer has no chat template, or one that cannot be compiled.
    """
    return encode(parse_record(fields), tokenizer, where=where, arguments=arguments)


def encode(
    record: PlainText | Conversation, tokenizer: Any, *, where: str, arguments: Mapping[str, Any] = _NOTHING
) -> list[int]:
    """Return the token ids of a record that :func:`~qwen_pipeline.text.records.parse_record` read.

    The arguments and the errors are those of :func:`encode_record`.
    """
    if not isinstance(record, Conversation):
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return [*_tokenize(record.text, tokenizer), *end]
    if not tokenizer.chat_template:
        raise InputRefused(
            f"{where} is a conversation, but the checkpoint's tokenizer has no chat template.",
            remedy='Use {"text": ...} records, or add the chat template to the checkpoint.',
        )
    messages = record.messages
    if any(_has_string_arguments(message) for message in messages) and _wants_mappings(tokenizer):
        messages = [_with_mappings(message) for message in messages]
    text = _render(messages, tokenizer, tools=record.tools, **{**arguments, **record.arguments})
    return _tokenize(text, tokenizer)


def encode_prompt(prompt: str, tokenizer: Any, *, arguments: Mapping[str, Any] = _NOTHING) -> list[int]:
    """Return a prompt's token ids: as a user's message if the tokenizer has a chat template, else as plain text.

    Raises:
        InputRefused: The chat template or the tokenizer refuses it.
    """
    try:
        if not tokenizer.chat_template:
            return _guarded(lambda: tokenizer(prompt)["input_ids"])
        messages = [{"role": "user", "content": prompt}]
        text = _render(messages, tokenizer, **{**arguments, "add_generation_prompt": True})
        return _tokenize(text, tokenizer)
    except BadRecord as bad:
        raise InputRefused(
            f"The prompt {ascii(prompt)[:80]} cannot be used: {bad}.",
            remedy="Change the prompt, the template's arguments, or the checkpoint's chat template.",
        ) from bad


def _render(messages: Sequence[Message], tokenizer: Any, **arguments: Any) -> str:
    """Return the text of messages in the chat template, as ``apply_chat_template`` formats it."""
    from jinja2 import TemplateSyntaxError

    try:
        text = _guarded(lambda: tokenizer.apply_chat_template(messages, tokenize=False, **arguments))
    except TemplateSyntaxError as error:
        raise InputRefused(
            f"The checkpoint's chat template cannot be compiled: line {error.lineno}: {error.message}.",
            remedy="Correct chat_template.jinja, or copy it from the model that was fine-tuned.",
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        raise BadRecord("the chat template refuses it", f"{_first_lines(error)} ({type(error).__name__})") from error
    if len(text) > _SLACK and len(text) > _EXPANSION * len(json.dumps([messages, arguments], default=str)):
        raise BadRecord("the chat template makes a text that is far longer", f"{len(text):,} characters")
    return text


def _tokenize(text: str, tokenizer: Any) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord("has half of a surrogate pair", ascii(text[max(0, error.start - 20) : error.end])) from error
    try:
        return _guarded(lambda: tokenizer(text, add_special_tokens=False)["input_ids"])
    except MemoryError:
        raise
    except Exception as error:
        raise BadRecord("the tokenizer refuses it", f"{_first_lines(error)} ({type(error).__name__})") from error


def _wants_mappings(tokenizer: Any) -> bool:
    """Return whether a template formats the arguments of a tool call well only if they are a mapping.

    OpenAI's API has them as JSON. Templates write such a text as it is, or encode it once more, or refuse it.
    """
    try:
        as_mapping, as_text = (
            _render([*_PROBE, _call(arguments), *_PROBE], tokenizer) for arguments in (_ARGUMENTS, _json(_ARGUMENTS))
        )
    except BadRecord:
        return True
    return as_mapping != as_text


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _call(arguments: object) -> Message:
    function = {"name": "name", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def _functions(message: Message) -> list[dict[str, Any]]:
    calls = message.get("tool_calls")
    calls = cast("list[object]", calls) if isinstance(calls, list) else []
    found = [cast("dict[str, Any]", call) for call in calls if isinstance(call, dict)]
    return [call["function"] if isinstance(call.get("function"), dict) else call for call in found]


def _has_string_arguments(message: Message) -> bool:
    return any(isinstance(function.get("arguments"), str) for function in _functions(message))


def _with_mappings(message: Message) -> Message:
    """Return a message in whose tool calls arguments that are the JSON of an object are decoded."""
    if not _has_string_arguments(message):
        return message
    calls = [
        {**call, "function": _decoded(call["function"])} if isinstance(call.get("function"), dict) else _decoded(call)
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _decoded(function: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (KeyError, TypeError, ValueError, RecursionError):
        return function
    return {**function, "arguments": arguments} if isinstance(arguments, dict) else function


def _guarded(call: Callable[[], _T]) -> _T:
    """Return a call's result; a panic of a Rust library, which is not an Exception, becomes one."""
    try:
        return call()
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise RuntimeError(str(error)) from error
        raise


def _first_lines(error: BaseException) -> str:
    return str(error).encode("utf-8", "backslashreplace").decode().strip()[:300]
