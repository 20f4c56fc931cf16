"""The check that the embedding has a row for every token of the tokenizer."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from qwen_pipeline.checkpoint.files import load_json
from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import CheckFailed, CheckpointRefused, InputRefused, listed
from qwen_pipeline.reports import CheckReport, CheckSpec
from qwen_pipeline.transforms.lora.vocabulary import vocabulary_of

TOKENIZER_FITS = CheckSpec(
    name="tokenizer_fits", description="The embedding has a row for each token of the tokenizer."
)


_REMEDY = "Merge with the tokenizer that the model was trained with, or train with an embedding that was resized to it."


def require_tokenizer_fits(checkpoint: Checkpoint) -> None:
    """Require that no token is known to have no row, before weights are written.

    Raises:
        CheckFailed: A token has none.
    """
    report = tokenizer_report(checkpoint)
    if not (report.passed or report.skipped):
        raise CheckFailed(f"{report.name}: {report.detail.removesuffix(_REMEDY).rstrip()}", remedy=_REMEDY)


def embedding_rows(checkpoint: Checkpoint) -> int:
    """Return the number of tokens that a model can embed.

    Raises:
        CheckpointRefused: It has no embedding.
    """
    return checkpoint[vocabulary_of(checkpoint).embedding].rows


def tokenizer_report(checkpoint: Checkpoint) -> CheckReport:
    """Report on :data:`TOKENIZER_FITS`: a token without a row ends a server, which reads past the embedding."""
    try:
        tokens, rows = token_ids(checkpoint.sidecars), embedding_rows(checkpoint)
    except InputRefused as refused:
        return TOKENIZER_FITS.skipped(f"Tokenizer and embedding cannot be compared: {refused.what}")
    if not tokens:
        return TOKENIZER_FITS.skipped("The checkpoint has no tokenizer with a tokenizer.json or a vocab.json.")
    beyond = sorted((number, token) for token, number in tokens.items() if number >= rows)
    detail = f"The last of {len(tokens):,} tokens is {max(tokens.values()):,}; the embedding has {rows:,} rows."
    if beyond:
        detail = (
            f"The embedding has {rows:,} rows, but none for {len(beyond):,} tokens of the tokenizer:"
            f" {listed([f'{number} {token!a}' for number, token in beyond])}. {_REMEDY}"
        )
    return TOKENIZER_FITS.report(
        passed=not beyond, measured=float(max(tokens.values()) + 1), limit=float(rows), detail=detail
    )


def token_ids(sidecars: Mapping[str, Path]) -> dict[str, int]:
    """Return token -> id of all files that add to a vocabulary; empty if there is none that is JSON.

    Raises:
        CheckpointRefused: A file is not JSON, or does not map tokens to numbers.
    """
    return {
        token: number
        for name in ("vocab.json", "added_tokens.json", "tokenizer.json", "tokenizer_config.json")
        if name in sidecars
        for token, number in _tokens_of(name, sidecars[name])
    }


def _tokens_of(name: str, file: Path) -> Iterator[tuple[str, int]]:
    content = load_json(file)
    try:
        for token, number in _pairs(name, content):
            yield str(token), int(number)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointRefused(
            f"{file} does not map tokens to numbers: {error!r}.", remedy="Save the tokenizer again."
        ) from error


def _pairs(name: str, content: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the tokens of a file of a tokenizer, and their numbers."""
    if name == "tokenizer.json":
        vocabulary: Any = (content.get("model") or {}).get("vocab") or {}
        if isinstance(vocabulary, Mapping):
            yield from cast("Mapping[Any, Any]", vocabulary).items()
        else:  # Unigram: pairs of token and score
            yield from ((token, number) for number, (token, *_) in enumerate(vocabulary))
        yield from ((each["content"], each["id"]) for each in content.get("added_tokens") or ())
    elif name == "tokenizer_config.json":
        added: Mapping[Any, Any] = content.get("added_tokens_decoder") or {}
        yield from ((token["content"], number) for number, token in added.items())
    else:
        yield from content.items()
