"""The types of the fields of a ``config.json`` that are read, checked once, where a checkpoint is opened."""

from collections.abc import Callable, Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any, TypeGuard, cast

from qwen_pipeline.checkpoint.files import load_json
from qwen_pipeline.errors import CheckpointRefused, listed


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def is_size(value: object) -> TypeGuard[int]:
    """Return whether a value of JSON is a positive integer that a size may have."""
    return _is_count(value) and value != 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1000 and isfinite(value)


def _is_list_of(kind: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(kind, cast("list[object]", value)))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


_IS: Mapping[str, Callable[[object], bool]] = {
    "an integer from 0 to 2^31 - 1": _is_count,
    "a finite number": _is_number,
    "true or false": lambda value: isinstance(value, bool),
    "a text": _is_text,
    "a list of texts": _is_list_of(_is_text),
    "a list of integers": _is_list_of(_is_count),
    "an integer or a list of them": lambda value: _is_count(value) or _is_list_of(_is_count)(value),
    "an object": lambda value: isinstance(value, Mapping),
}
_SECTIONS = ("text_config", "vision_config", "audio_config", "thinker_config", "talker_config", "code2wav_config")
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "an integer from 0 to 2^31 - 1": (
        "hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
        "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "num_experts",
        "num_local_experts", "num_experts_per_tok", "decoder_sparse_step", "full_attention_interval",
        "max_position_embeddings", "linear_num_value_heads", "linear_num_key_heads", "linear_key_head_dim",
        "linear_value_head_dim", "linear_conv_kernel_dim", "hc_count", "hc_lowrank", "indexer_n_heads",
        "indexer_kv_heads", "indexer_head_dim", "ple_embed_dim", "depth", "max_window_layers",
    ),
    "a finite number": (
        "rms_norm_eps", "rope_theta", "attention_dropout", "initializer_range", "partial_rotary_factor",
    ),
    "true or false": ("tie_word_embeddings", "attention_bias", "use_sliding_window", "norm_topk_prob"),
    "a text": ("model_type", "hidden_act", "dtype", "torch_dtype"),
    "a list of texts": ("architectures", "layer_types"),
    "a list of integers": ("mlp_only_layers", "ple_layer_ids"),
    "an integer or a list of them": ("eos_token_id",),
    "an object": (*_SECTIONS, "rope_parameters", "rope_scaling", "quantization_config", "compression_config"),
}  # fmt: skip
_KINDS = {field: kind for kind, fields in _FIELDS.items() for field in fields}
"""Field -> its type in words; null is allowed, and means the default."""


def load_config_file(file: Path) -> dict[str, Any]:
    """Read a ``config.json``.

    Raises:
        CheckpointRefused: It is missing, is not a JSON object, or a field has the wrong type.
    """
    config = load_json(file)
    require_types(config, source=file)
    return config


def require_types(config: Mapping[str, Any], *, source: object) -> None:
    """Check the types of all known fields of a config and of its sections.

    Raises:
        CheckpointRefused: A field has another type; the message names it, its value and the type.
    """
    if wrong := list(_wrong(config)):
        raise CheckpointRefused(
            f"{source} has values of wrong types: {listed(wrong)}.",
            remedy="Correct config.json, or fetch it again: a fine-tune has the sizes of its base.",
        )


def _wrong(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for field, value in config.items():
        kind = _KINDS.get(field)
        if kind is None or value is None:
            continue
        if not _IS[kind](value):
            yield f"{prefix}{field} is {ascii(value)[:60]}, expected {kind}"
        elif field in _SECTIONS:
            yield from _wrong(value, f"{prefix}{field}.")
