"""Held-out text as windows of token ids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.text.records import encode_record, load_records


def token_windows(text: Path, tokenizer: Any, *, windows: int, seq_len: int) -> list[list[int]]:
    """Return up to ``windows`` windows of ``seq_len`` tokens, without overlap, spread evenly over the whole text.

    Raises:
        InputRefused: The text cannot be read, or has fewer tokens than one window.
    """
    tokens = [
        token
        for record in load_records(text)
        for token in encode_record(record, tokenizer, where=f"{text} line {record['line']}")
    ]
    if len(tokens) < seq_len:
        raise InputRefused(
            f"{text} has {len(tokens):,} tokens, fewer than one window of {seq_len}.",
            remedy="Provide more text, or lower seq_len.",
        )
    return spread(tokens, windows=windows, seq_len=seq_len)


def spread(tokens: Sequence[int], *, windows: int, seq_len: int) -> list[list[int]]:
    """Return up to ``windows`` windows of tokens, spread evenly; a text shorter than one gives a single one."""
    available = max(len(tokens) // seq_len, 1)
    count = min(windows, available)
    starts = (index * available // count * seq_len for index in range(count))
    return [list(tokens[start : start + seq_len]) for start in starts]
