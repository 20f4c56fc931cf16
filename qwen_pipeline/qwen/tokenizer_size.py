"""The number of tokens of a checkpoint's tokenizer, which must not exceed the rows of its embedding."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.files import load_json
from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.qwen.families import config_values
from qwen_pipeline.reports import CheckReport, CheckSpec

TOKENIZER_FITS = CheckSpec(
    name="tokenizer_fits_embedding", description="The embedding has a row for every token of the tokenizer."
)


def tokenizer_report(checkpoint: Checkpoint) -> CheckReport:
    """Report on :data:`TOKENIZER_FITS`; the config must state the rows of the embedding as ``vocab_size``."""
    highest = max(_token_ids(checkpoint.sidecars), default=None)
    rows = max(config_values(checkpoint.config, "vocab_size"), default=0)
    if highest is None or not rows:
        return TOKENIZER_FITS.skipped("There is no tokenizer.json or vocab.json to read token numbers from.")
    passed = highest < rows
    return TOKENIZER_FITS.report(
        passed=passed,
        measured=float(highest + 1),
        limit=float(rows),
        detail=f"Token {highest} is the last one, and the embedding has {rows} rows."
        if passed
        else f"Tokens up to {highest} exist, but the embedding has {rows} rows: a prompt with one of the last"
        f" {highest + 1 - rows} fails. Resize the embedding in training, or use the tokenizer that the model was"
        " trained with.",
    )


def _token_ids(sidecars: Mapping[str, Path]) -> Iterator[int]:
    """Yield the numbers of all tokens: those of ``tokenizer.json``, or else of the files of a slow tokenizer."""
    if file := sidecars.get("tokenizer.json"):
        tokenizer = load_json(file)
        model = tokenizer.get("model") or {}
        yield from _integers(model.get("vocab"))
        yield from _integers({token.get("content"): token.get("id") for token in tokenizer.get("added_tokens") or ()})
        return
    for name in ("vocab.json", "added_tokens.json"):
        if file := sidecars.get(name):
            yield from _integers(load_json(file))


def _integers(vocabulary: Any) -> Iterator[int]:
    """Yield the numbers of a vocabulary: token -> number, or a list of tokens in their order."""
    if isinstance(vocabulary, Mapping):
        yield from (number for number in vocabulary.values() if isinstance(number, int))
    elif isinstance(vocabulary, list) and vocabulary:
        yield len(vocabulary) - 1
