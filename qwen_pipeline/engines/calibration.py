"""Calibration text as windows of tokens: drawn by seed, packed without padding, named by a digest.

A JSONL file has one record per line: ``{"text": "..."}``, followed by the end-of-text token when it is packed, or
``{"messages": [{"role": ..., "content": ...}, ...]}``, written out by the checkpoint's own chat template. Records are
packed back to back in an order that depends on the seed and their number only, and cut into full windows.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qwen_pipeline.checkpoint.digest import as_bytes
from qwen_pipeline.errors import InputRefused

if TYPE_CHECKING:
    import torch


def draw_windows(file: Path, checkpoint: Path, *, samples: int, seq_len: int, seed: int) -> "torch.Tensor":
    """Return calibration tokens, int32 of shape ``[samples, seq_len]``.

    Records are tokenized only until the windows are full.

    Raises:
        InputRefused: A line is not a record, the checkpoint has no tokenizer or no chat template for conversations, or
            the whole file has too few tokens.
    """
    import torch

    records = load_records(file)
    tokenizer = _load_tokenizer(checkpoint)
    needed = samples * seq_len
    tokens: list[int] = []
    for index in shuffled(len(records), seed):
        tokens += _encode(records[index], tokenizer, where=f"{file} line {records[index]['line']}")
        if len(tokens) >= needed:
            return torch.tensor(tokens[:needed], dtype=torch.int32).reshape(samples, seq_len)
    raise InputRefused(
        f"{file} has {len(tokens):,} tokens, but {samples} windows of {seq_len} need {needed:,}.",
        remedy="Add calibration text, or lower samples or seq_len.",
    )


def window_digest(windows: "torch.Tensor") -> str:
    """Return ``sha256:<hex>`` of shape and token ids."""
    import torch

    sha = hashlib.sha256(json.dumps(list(windows.shape)).encode())
    sha.update(as_bytes(windows.to(torch.int32)))
    return f"sha256:{sha.hexdigest()}"


def shuffled(count: int, seed: int) -> list[int]:
    """Return a permutation of ``range(count)``, the same in every process and version: ordered by hashes."""
    return sorted(range(count), key=lambda index: hashlib.sha256(f"{seed}:{index}".encode()).digest())


def load_records(file: Path) -> list[Mapping[str, Any]]:
    """Read a JSONL file of ``text`` or ``messages``; each record gains ``line``, its number from 1. Blank lines pass.

    Raises:
        InputRefused: The file is missing or empty, or a line is not a record.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputRefused(f"{file} cannot be read: {error}.", remedy="Name a JSONL file in UTF-8.") from error
    records = [_parse(line, file, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not records:
        raise InputRefused(f"{file} holds no records.", remedy=_FORMAT)
    return records


_FORMAT = 'Write one JSON object per line: {"text": "..."} or {"messages": [{"role": "user", "content": "..."}]}.'


def _parse(line: str, file: Path, number: int) -> Mapping[str, Any]:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise InputRefused(f"{file} line {number} is not valid JSON: {error}.", remedy=_FORMAT) from error
    record = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    if _is_text(record) != _is_conversation(record):
        return {**record, "line": number}
    raise InputRefused(f"{file} line {number} is neither text nor a conversation: {line[:80]}", remedy=_FORMAT)


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


def _load_tokenizer(checkpoint: Path) -> Any:
    from transformers import AutoTokenizer  # a second of imports that only this needs

    try:
        return cast("Any", AutoTokenizer).from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputRefused(
            f"{checkpoint} has no tokenizer that can be loaded: {error}",
            remedy="Keep the tokenizer with the checkpoint.",
        ) from error


def _encode(record: Mapping[str, Any], tokenizer: Any, *, where: str) -> Sequence[int]:
    if "text" in record:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return [*tokenizer(record["text"], add_special_tokens=False)["input_ids"], *end]
    if not tokenizer.chat_template:
        raise InputRefused(
            f"{where} is a conversation, but the checkpoint's tokenizer has no chat template.",
            remedy='Use {"text": ...} records, or add the chat template to the checkpoint.',
        )
    conversation = tokenizer.apply_chat_template(record["messages"], tokenize=False)
    return tokenizer(conversation, add_special_tokens=False)["input_ids"]
