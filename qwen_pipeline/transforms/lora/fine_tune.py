"""The sidecar files of a merged model."""

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

_TOKENIZER = (
    "tokenizer*", "vocab.json", "merges.txt", "*.tiktoken", "special_tokens_map.json", "added_tokens.json",
    "chat_template.*", "additional_chat_templates/*",
)  # fmt: skip
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_LEGAL = ("LICENSE*", "NOTICE*")


def merged_sidecars(base: Mapping[str, Path], fine_tune: Mapping[str, Path]) -> dict[str, Path]:
    """Return the sidecars of a merged model: the base's, with the fine-tune's of the same name in their place.

    A fine-tune with a vocabulary replaces the whole tokenizer of the base, because a leftover file of the base's, such
    as a chat template, could override the fine-tune's own. The base's licence stays.
    """
    replaced = _TOKENIZER if any(_matches(path, _VOCABULARIES) for path in fine_tune) else ()
    kept = {path: file for path, file in base.items() if not _matches(path, replaced)}
    added = {path: file for path, file in fine_tune.items() if not (_matches(path, _LEGAL) and path in base)}
    return kept | added


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)
