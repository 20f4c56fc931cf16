"""Held-out text as windows of token ids."""

from pathlib import Path
from typing import Any

from qwen_pipeline.corpus import encode_record, load_records
from qwen_pipeline.errors import InputRefused


def token_windows(text: Path, tokenizer: Any, *, windows: int, seq_len: int) -> list[list[int]]:
    """Return up to ``windows`` windows of ``seq_len`` tokens, without overlap, spread evenly over the whole text.

    Raises:
        InputRefused: The text cannot be read, or is shorter than one window.
    """
    tokens = [
        token
        for record in load_records(text)
        for token in encode_record(record, tokenizer, where=f"{text} line {record['line']}")
    ]
    available = len(tokens) // seq_len
    if not available:
        raise InputRefused(
            f"{text} has {len(tokens):,} tokens, fewer than one window of {seq_len}.",
            remedy="Give more text, or lower seq_len.",
        )
    count = min(windows, available)
    starts = (index * available // count * seq_len for index in range(count))
    return [tokens[start : start + seq_len] for start in starts]
