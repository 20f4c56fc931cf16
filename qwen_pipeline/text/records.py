"""Records of text in files, and their tokens.

A ``.txt`` file is one record. Any other file is JSONL with one record a line: ``{"text": "..."}``, whose tokens end
with the end-of-text token, or ``{"messages": [{"role": ..., "content": ...}, ...]}``, which the checkpoint's own chat
template formats.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from qwen_pipeline.errors import InputRefused

PARQUET = ".parquet"
SUFFIXES = (".jsonl", ".json", ".txt", PARQUET)
"""Suffixes of files that hold text."""
_FORMAT = 'Write one JSON object per line: {"text": "..."} or {"messages": [{"role": "user", "content": "..."}]}.'


def load_records(file: Path) -> list[Mapping[str, Any]]:
    """Read a file's records, each with its ``line`` number from 1. Blank lines are skipped.

    Raises:
        InputRefused: The file cannot be read or has no records, or a line is not a record.
    """
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputRefused(f"{file} cannot be read: {error}.", remedy="Pass a JSONL or .txt file in UTF-8.") from error
    if file.suffix == ".txt":
        return [{"text": content, "line": 1}]
    lines = content.split("\n")
    records = [_parse(line, file, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not records:
        raise InputRefused(f"{file} holds no records.", remedy=_FORMAT)
    return records


def load_tokenizer(checkpoint: Path) -> Any:
    """Load the tokenizer in a checkpoint's directory.

    Raises:
        InputRefused: There is no tokenizer, or it cannot be loaded.
    """
    from transformers import AutoTokenizer  # takes a second to import

    try:
        return cast("Any", AutoTokenizer).from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputRefused(
            f"{checkpoint} has no tokenizer that can be loaded: {error}",
            remedy="Copy the tokenizer's files into the checkpoint's directory.",
        ) from error


def encode_record(record: Mapping[str, Any], tokenizer: Any, *, where: str) -> list[int]:
    """Return a record's token ids.

    Args:
        record: The record.
        tokenizer: The checkpoint's tokenizer.
        where: The location of the record, for error messages.

    Raises:
        InputRefused: The record is a conversation, and the tokenizer has no chat template.
    """
    if "text" in record:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return [*tokenizer(record["text"], add_special_tokens=False)["input_ids"], *end]
    if not tokenizer.chat_template:
        raise InputRefused(
            f"{where} is a conversation, but the checkpoint's tokenizer has no chat template.",
            remedy='Use {"text": ...} records, or add the chat template to the checkpoint.',
        )
    return _encode_chat(record["messages"], tokenizer)


def encode_prompt(prompt: str, tokenizer: Any) -> list[int]:
    """Return a prompt's token ids: as a user's message if the tokenizer has a chat template, else as plain text."""
    if not tokenizer.chat_template:
        return tokenizer(prompt)["input_ids"]
    return _encode_chat([{"role": "user", "content": prompt}], tokenizer, add_generation_prompt=True)


def _encode_chat(
    messages: list[Mapping[str, str]], tokenizer: Any, *, add_generation_prompt: bool = False
) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _parse(line: str, file: Path, number: int) -> Mapping[str, Any]:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise InputRefused(f"{file} line {number} is not valid JSON: {error}.", remedy=_FORMAT) from error
    record = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    if is_record(record):
        return {**record, "line": number}
    raise InputRefused(f"{file} line {number} is neither text nor a conversation: {line[:80]}", remedy=_FORMAT)


def is_record(record: Mapping[str, Any]) -> bool:
    """Return whether a record is either a text or a conversation, and not both."""
    return _is_text(record) != _is_conversation(record)


def _is_text(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("text"), str) and bool(record["text"])


def _is_conversation(record: Mapping[str, Any]) -> bool:
    messages = cast("list[object]", record["messages"]) if isinstance(record.get("messages"), list) else []
    return bool(messages) and all(_is_message(message) for message in messages)


def _is_message(message: object) -> bool:
    if not isinstance(message, dict):
        return False
    fields = cast("dict[str, object]", message)
    return all(isinstance(fields.get(key), str) for key in ("role", "content"))
