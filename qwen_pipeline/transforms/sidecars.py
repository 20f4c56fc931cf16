"""The sidecar files of a merged model: the tokenizer, the chat template and the settings of generation."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from qwen_pipeline.checkpoint.files import load_json
from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.qwen.heads import head_kind, without_steps
from qwen_pipeline.qwen.text_only import without_processors

_CONFIG = "tokenizer_config.json"
_LEGAL = ("LICENSE*", "NOTICE*")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Files that mean something only together: a part of a tokenizer.

    Attributes:
        files: The group; if the fine-tune brings the group, none of the base's files of it remain.
        brought_by: The files of a fine-tune that bring it.
    """

    files: tuple[str, ...]
    brought_by: tuple[str, ...]


_VOCABULARY = _Group(
    files=("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "*.tiktoken", "added_tokens.json"),
    brought_by=("tokenizer.json", "tokenizer.model", "vocab.json"),
)
_SETTINGS = _Group(files=(_CONFIG, "special_tokens_map.json"), brought_by=(_CONFIG,))
_TEMPLATES = _Group(
    files=("chat_template.*", "additional_chat_templates/*"),
    brought_by=("chat_template.*",),
)
_GROUPS = (_VOCABULARY, _SETTINGS, _TEMPLATES)


def with_sidecars(
    output: Checkpoint, base: Checkpoint, fine_tune: Mapping[str, Path], *, text_only: bool = False
) -> Checkpoint:
    """Return a merged checkpoint with the sidecars of base and fine-tune; a language model alone has no processors.

    Raises:
        CheckpointRefused: See :func:`merged_sidecars`.
    """
    sidecars = merged_sidecars(without_steps(base.sidecars, head_kind(output)), fine_tune)
    return output.replace(sidecars=without_processors(sidecars) if text_only else sidecars)


def merged_sidecars(base: Mapping[str, Path], fine_tune: Mapping[str, Path]) -> dict[str, Path]:
    """Return the sidecars of a merged model: the base's, with the fine-tune's of the same name in their place.

    Of the tokenizer, each part that the fine-tune brings replaces the base's whole part: its vocabulary, its settings,
    its chat template, wherever that stands. Transformers would prefer a leftover ``chat_template.jinja`` to a template
    in ``tokenizer_config.json``, and tokens of a leftover ``added_tokens.json`` would be added. A fine-tune with
    vocabulary and settings brings all of its tokenizer. The base's licence stays.

    Raises:
        CheckpointRefused: The fine-tune's ``tokenizer_config.json`` is not a JSON object.
    """
    replaced = [group for group in _GROUPS if any(_matches(path, group.brought_by) for path in fine_tune)]
    if (_VOCABULARY in replaced and _SETTINGS in replaced) or _has_template(fine_tune.get(_CONFIG)):
        replaced.append(_TEMPLATES)
    patterns = tuple(pattern for group in replaced for pattern in group.files)
    kept = {path: file for path, file in base.items() if not _matches(path, patterns)}
    added = {path: file for path, file in fine_tune.items() if not (_matches(path, _LEGAL) and path in base)}
    return kept | added


def _has_template(config: Path | None) -> bool:
    """Return whether a ``tokenizer_config.json`` has a chat template."""
    return config is not None and bool(load_json(config).get("chat_template"))


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)
