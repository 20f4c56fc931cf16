"""Calibration text as windows of tokens: drawn by seed, packed without padding, named by a digest.

Records are packed back to back in an order that depends on the seed and their number only, and cut into full windows.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_pipeline.checkpoint.digest import as_bytes
from qwen_pipeline.corpus import encode_record, load_records, load_tokenizer
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
    tokenizer = load_tokenizer(checkpoint)
    needed = samples * seq_len
    tokens: list[int] = []
    for index in shuffled(len(records), seed):
        tokens += encode_record(records[index], tokenizer, where=f"{file} line {records[index]['line']}")
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
