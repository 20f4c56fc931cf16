"""The language model of a composite model alone, as Transformers loads and saves it under a ``model_type`` of its own.

Source: ``MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`` of Transformers 5.23, which names a class for the composite type and for
that of its ``text_config``.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.families import (
    ARCHITECTURES,
    TIED,
    Config,
    Family,
    ModelPart,
    declares_tied,
    require_family,
    text_config,
)
from qwen_pipeline.qwen.names import SCORE, parse_name, spellings

LANGUAGE: tuple[ModelPart, ...] = ("decoder", "embedding", "norm", "head", "mtp")
"""The parts of a language model."""
_SPELLING = Family(decoder=("model.",), drafts=True)
_OF_THE_WHOLE = ("transformers_version", "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id")
"""Fields that a composite config may have at the top alone."""
_OF_TOWERS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "spk_dict.pt")
"""Sidecars that prepare images, videos and sounds."""


def language_model(checkpoint: Checkpoint) -> Checkpoint:
    """Return the language model of a composite model, draft head included; a model without towers is unchanged.

    Raises:
        InputRefused: The family is unknown, Transformers has no class for its language model alone, or the checkpoint
            is a classifier.
        CheckpointRefused: The family has no such tensor.
    """
    config = checkpoint.config
    if (kind := _text_type(config)) == config.get("model_type"):
        return checkpoint
    names = {name: parse_name(name, config) for name in checkpoint}
    if any(parsed.module == SCORE for parsed in names.values()):
        raise InputRefused(
            "The language model of a classifier is not released alone.", remedy="Leave out text_only (--text-only)."
        )
    stored = {spellings(parsed, _SPELLING)[0]: name for name, parsed in names.items() if parsed.part in LANGUAGE}
    return replace(
        checkpoint,
        config=_config_alone(config, kind),
        config_bytes=None,
        tensors={new: checkpoint.tensors[name] for new, name in stored.items()},
        shards={new: checkpoint.shards[name] for new, name in stored.items()},
    )


def without_processors(sidecars: Mapping[str, Path]) -> dict[str, Path]:
    """Return sidecars without those of towers."""
    return {path: file for path, file in sidecars.items() if path not in _OF_TOWERS}


def others_than_language(checkpoint: Checkpoint) -> dict[str, ModelPart]:
    """Return the tensors that :func:`language_model` leaves out -> the part that owns each."""
    parts: dict[str, ModelPart] = {name: parse_name(name, checkpoint.config).part for name in checkpoint}
    return {name: part for name, part in parts.items() if part not in LANGUAGE}


def _text_type(config: Config) -> str:
    """Return the ``model_type`` under which the language model is saved alone; the config's own if it has no towers."""
    kind = str(config.get("model_type"))
    if not require_family(config).towers or (text := text_config(config)) is config:
        return kind
    alone = str(text.get("model_type") or f"{kind}_text")
    if alone not in ARCHITECTURES:
        raise InputRefused(
            f"Transformers has no class for the language model of {kind} alone, so it cannot be released without its"
            " towers.",
            remedy="Leave out text_only (--text-only): the towers stay in full precision.",
        )
    return alone


def _config_alone(config: Config, kind: str) -> dict[str, Any]:
    text = text_config(config)
    outer = {field: config[field] for field in _OF_THE_WHOLE if field in config and field not in text}
    own = {"model_type": kind, "architectures": [ARCHITECTURES[kind][0]], TIED: declares_tied(config)}
    return {**outer, **text, **own}
