"""Held-out text as windows of token ids."""

from collections.abc import Sequence
from pathlib import Path

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.text.reading import RecordReader, RecordUse
from qwen_pipeline.text.sources import open_text
from qwen_pipeline.text.spec import DEFAULT_TEXT_SPEC, TextSpec
from qwen_pipeline.text.tokenizers import Tokenizer


def token_windows(text: Path, tokenizer: Tokenizer, *, windows: int, seq_len: int) -> list[list[int]]:
    """Return up to ``windows`` windows of ``seq_len`` tokens, without overlap, spread evenly over the whole text.

    Raises:
        InputRefused: The text cannot be read, or has fewer tokens than one window.
    """
    return read_windows(text, tokenizer, windows=windows, seq_len=seq_len)[0]


def read_windows(
    text: Path, tokenizer: Tokenizer, *, windows: int, seq_len: int, spec: TextSpec = DEFAULT_TEXT_SPEC
) -> tuple[list[list[int]], RecordUse]:
    """Return the windows of :func:`token_windows`, and the use of the text's records.

    Raises:
        InputRefused: The text cannot be read, has too many records that cannot be used, or has fewer tokens than one
            window.
    """
    source = open_text(text)
    reader = RecordReader(source, tokenizer, spec)
    records = reader.tokens(range(len(source)))
    tokens = [token for record in records for token in record]
    reader.require_few_skipped(records)
    if len(tokens) < seq_len:
        use = "" if reader.use.used == len(source) else f" {reader.use}"
        raise InputRefused(
            f"{text} has {len(tokens):,} tokens, fewer than one window of {seq_len}.{use}",
            remedy="Provide more text, or lower seq_len.",
        )
    return spread(tokens, windows=windows, seq_len=seq_len), reader.use


def spread(tokens: Sequence[int], *, windows: int, seq_len: int) -> list[list[int]]:
    """Return up to ``windows`` windows of tokens, spread evenly; a text shorter than one gives a single one."""
    available = max(len(tokens) // seq_len, 1)
    count = min(windows, available)
    starts = (index * available // count * seq_len for index in range(count))
    return [list(tokens[start : start + seq_len]) for start in starts]
