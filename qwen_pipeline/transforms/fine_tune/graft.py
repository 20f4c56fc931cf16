"""The config of an adopted fine-tune: its own, or the base's with the values that the fine-tune's language model has.

A fine-tune may be saved as a part of its base: Transformers loads the language model of a composite model alone, and
saves it under another ``model_type``. Parts that it lacks come from the base, and so do their sections of the config.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from qwen_pipeline.errors import CheckpointRefused, listed
from qwen_pipeline.qwen.config import REMOVED, with_values
from qwen_pipeline.qwen.families import (
    Config,
    ModelPart,
    config_items,
    config_paths,
    declares_tied,
    text_config,
    text_prefix,
    tie_paths,
)

_OF_SAVING = frozenset({
    "architectures", "auto_map", "_name_or_path", "transformers_version", "torch_dtype", "dtype", "model_type",
    "quantization_config", "compression_config", "use_cache", "tie_word_embeddings", "_attn_implementation_autoset",
})  # fmt: skip
"""Fields of a text config that do not belong to the language model, or that the stored weights decide."""
_ROPE = ("rope_parameters", "rope_theta", "rope_scaling")
"""Spellings of one setting: Transformers 5 saves the first, earlier ones the others."""
_SECTIONS: Mapping[ModelPart, tuple[str, ...]] = {
    "vision": ("vision_config",),
    "audio": ("audio_config",),
    "talker": ("talker_config",),
    "vocoder": ("token2wav_config", "code2wav_config"),
}
_DRAFT_FIELDS = "mtp_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grafted:
    """A config of the base's family, and a sentence for each difference from the fine-tune's."""

    config: Mapping[str, Any]
    remarks: tuple[str, ...] = ()


def graft(base: Config, fine_tune: Config) -> Grafted:
    """Return the config of a fine-tune as one of the base's family.

    Raises:
        CheckpointRefused: Neither of the model types is that of a part of the other.
    """
    base_type, own_type = str(base.get("model_type")), str(fine_tune.get("model_type"))
    if base_type == own_type:
        return Grafted(config=fine_tune)
    if own_type not in _part_types(base) and base_type not in _part_types(fine_tune):
        raise CheckpointRefused(
            f"The full fine-tune does not match this base: its model_type is {own_type}, but the base's is"
            f" {base_type}.",
            remedy="Use the base that the model was trained from.",
        )
    values = _changed_values(base, fine_tune)
    taken = f", with its own {listed(sorted(values))}" if values else ""
    remark = f"the fine-tune was saved as {own_type}, so the config is the base's{taken}"
    return Grafted(config=with_values(base, values) if values else base, remarks=(remark,))


def with_sections_of(base: Config, config: Config, parts: Collection[ModelPart]) -> Grafted:
    """Return a fine-tune's config with the base's sections of parts that come from the base."""
    fields = [field for part in parts for field in _SECTIONS.get(part, ())]
    fields += [field for field in text_config(base) if field.startswith(_DRAFT_FIELDS)] if "mtp" in parts else []
    values = {path: value for field in fields for path, value in config_items(base, field).items()}
    values = {path: value for path, value in values.items() if _value_at(config, path) != value}
    remarks = [f"{', '.join(values)} written: the part comes from the base"] if values else []
    return Grafted(config=with_values(config, values) if values else config, remarks=tuple(remarks))


def _part_types(config: Config) -> set[str]:
    """Return the model types under which the language model of a composite model is saved alone."""
    named = {str(kind) for kind in config_items(config, "model_type").values()}
    return named | {f"{config.get('model_type')}_{part}" for part in ("text", "thinker")}


def _changed_values(base: Config, fine_tune: Config) -> dict[str, Any]:
    """Return the values of the fine-tune's language model that the base's config does not have: path -> value."""
    prefix = text_prefix(base)
    old, new = text_config(base), text_config(fine_tune)
    values: dict[str, Any] = {}
    for field, value in new.items():
        is_own = not isinstance(value, Mapping) and field not in _OF_SAVING and field not in _ROPE
        if is_own and (old.get(field, value) != value or (field not in old and value is not None)):
            values |= dict.fromkeys(config_paths(base, field) or (prefix + field,), value)
    if declares_tied(fine_tune) and not declares_tied(base):
        values |= dict.fromkeys(tie_paths(base), True)
    dtype = new.get("dtype") or new.get("torch_dtype")
    dtypes = {path: old for field in ("dtype", "torch_dtype") for path, old in config_items(base, field).items()}
    values |= {path: dtype for path, old in dtypes.items() if dtype and old and old != dtype}
    return values | dict(_changed_rope(old, new, prefix))


def _changed_rope(old: Config, new: Config, prefix: str) -> Iterator[tuple[str, Any]]:
    if _rope(old) == _rope(new):
        return
    for field in _ROPE:
        if field in new or field in old:
            yield prefix + field, new.get(field, REMOVED)


def _rope(text: Config) -> dict[str, Any]:
    """Return the settings of rotary embeddings, in one spelling."""
    settings: dict[str, Any] = {"rope_theta": text.get("rope_theta")}
    for field in ("rope_scaling", "rope_parameters"):
        if isinstance(value := text.get(field), Mapping):
            settings |= cast("Mapping[str, Any]", value)
    kind = settings.pop("type", None)
    return {"rope_type": kind or "default"} | {name: value for name, value in settings.items() if value is not None}


def _value_at(config: Config, path: str) -> Any:
    value: Any = config
    for field in path.split("."):
        value = value.get(field) if isinstance(value, Mapping) else None
    return value
