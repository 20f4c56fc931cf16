"""The Qwen families: what their layers consist of, where their configs keep sizes, how their tensors are named.

The tables were read from Transformers 5.23 (``models/qwen*/configuration_*.py`` and ``modeling_*.py``,
``conversion_mapping.py``); a test compares them with every family of the installed Transformers. A family that is not
here is refused: nothing is guessed from the shape of a config.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import InputRefused

Config = Mapping[str, Any]
DecoderField = Literal["intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"]
TowerField = Literal["vision_config.intermediate_size", "audio_config.encoder_ffn_dim"]
SizeField = Literal[DecoderField, TowerField]
"""The sizes that padding may move, those of towers on request; ``hidden_size`` never does."""
ModelPart = Literal["decoder", "embedding", "norm", "head", "mtp", "vision", "audio", "talker", "vocoder"]
"""What a tensor belongs to. ``mtp`` is a draft head whose layers are built from the decoder's config."""
Mixer = Literal["attention", "next", "3.5", "4"]
"""What mixes tokens: full attention, or gated delta nets (as in Qwen3-Next, Qwen3.5, Qwen4) beside it."""

_TOWERS: Mapping[str, ModelPart] = {"visual.": "vision", "model.visual.": "vision"}
_EARS: Mapping[str, ModelPart] = {
    f"{prefix}{tower}.": "audio" for prefix in ("", "model.") for tower in ("audio_tower", "multi_modal_projector")
}
_NESTED = ("model.language_model.", "model.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One value of ``model_type``.

    Attributes:
        mixer: What mixes tokens.
        experts: Whether layers may be mixtures of experts (``num_experts``, ``moe_intermediate_size``).
        shared: Whether such a layer has a shared expert (``shared_expert_intermediate_size``).
        decoder: Prefixes that decoder tensors may have on disk or in memory.
        heads: Names of the output head, without ``.weight``.
        towers: Prefix of a tensor outside the decoder -> what it belongs to.
        head_dim: Default of the config field; 0 means ``hidden_size // num_attention_heads``.
        drafts: Whether published checkpoints have a multi-token prediction head at ``mtp.``.
        ties: Whether ``tie_word_embeddings`` has a meaning (``_tied_weights_keys`` of the model's class).
    """

    mixer: Mixer = "attention"
    experts: bool = False
    shared: bool = False
    decoder: tuple[str, ...] = ("model.",)
    heads: tuple[str, ...] = ("lm_head",)
    towers: Mapping[str, ModelPart] = field(default_factory=dict[str, ModelPart])
    head_dim: int = 0
    drafts: bool = False
    ties: bool = True


def _thinker(towers: Mapping[str, ModelPart], **rest: Any) -> Family:
    """A thinker alone, or the whole omni model that it is part of: both spellings are met in one and the same file."""
    spelled: dict[str, ModelPart] = {
        prefix + tower: part for tower, part in towers.items() for prefix in ("thinker.", "")
    }
    return Family(
        decoder=("thinker.model.language_model.", "thinker.model.", *_NESTED),
        heads=("thinker.lm_head", "lm_head"),
        towers={**spelled, "talker.": "talker", "token2wav.": "vocoder", "code2wav.": "vocoder"},
        **rest,
    )


_VL = Family(decoder=_NESTED, towers=_TOWERS)
_OMNI_2_5 = _thinker({**_TOWERS, **_EARS})
_OMNI_3 = _thinker({**_TOWERS, **_EARS}, experts=True)
_TEXT_3_5 = Family(mixer="3.5", decoder=_NESTED, towers=_TOWERS, head_dim=256, drafts=True)
_TEXT_3_5_MOE = Family(
    mixer="3.5", experts=True, shared=True, decoder=_NESTED, towers=_TOWERS, head_dim=256, drafts=True
)
_TEXT_4 = Family(mixer="4", experts=True, shared=True, decoder=_NESTED, towers=_TOWERS, head_dim=256, drafts=True)

FAMILIES: Mapping[str, Family] = {
    "qwen2": Family(),
    "qwen2_moe": Family(experts=True, shared=True),
    "qwen2_vl": _VL,
    "qwen2_5_vl": _VL,
    "qwen2_5_omni": _OMNI_2_5,
    "qwen2_5_omni_thinker": _OMNI_2_5,
    "qwen2_audio": Family(
        decoder=("language_model.model.", *_NESTED),
        heads=("language_model.lm_head", "lm_head"),
        towers=_EARS,
        ties=False,
    ),
    "qwen3": Family(head_dim=128),
    "qwen3_moe": Family(experts=True),
    "qwen3_next": Family(mixer="next", experts=True, shared=True, head_dim=256, drafts=True),
    "qwen3_vl": Family(decoder=_NESTED, towers=_TOWERS, head_dim=128),
    "qwen3_vl_moe": Family(experts=True, decoder=_NESTED, towers=_TOWERS),
    "qwen3_omni_moe": _OMNI_3,
    "qwen3_omni_moe_thinker": _OMNI_3,
    "qwen3_asr": Family(decoder=_NESTED, towers=_EARS, head_dim=128),
    "qwen3_5": _TEXT_3_5,
    "qwen3_5_text": _TEXT_3_5,
    "qwen3_5_moe": _TEXT_3_5_MOE,
    "qwen3_5_moe_text": _TEXT_3_5_MOE,
    "qwen4_exp": _TEXT_4,
    "qwen4_exp_text": _TEXT_4,
}


def require_family(config: Config) -> Family:
    """Return what is known of the config's ``model_type``.

    Raises:
        InputRefused: Nothing is.
    """
    name = str(config.get("model_type"))
    if name in FAMILIES:
        return FAMILIES[name]
    raise InputRefused(
        f"Models of type {name!r} are not known here: which tensors carry which size is only known for Qwen families.",
        remedy=f"Use a model of one of the families {', '.join(FAMILIES)}.",
    )


def text_config(config: Config) -> Config:
    """Return the part of a config that describes the language model: ``thinker_config``, ``text_config``, or all."""
    return _levels(config)[-1][1]


def config_paths(config: Config, field: str) -> tuple[str, ...]:
    """Return every place of the language model's ``field``, such as ``thinker_config.text_config.intermediate_size``.

    A vision-language config may repeat it at the top. Fields that describe towers have a path of their own, such as
    ``vision_config.intermediate_size``.
    """
    return tuple(place for place, _ in _placed(config, field))


def config_values(config: Config, field: str) -> set[Any]:
    """Return the values at :func:`config_paths`; a sound config has one."""
    return {value for _, value in _placed(config, field)}


def has_section(config: Config, name: str) -> bool:
    """Whether the config has a part of this name on the way to the language model, such as ``vision_config``."""
    return any(value for _, value in _placed(config, name))


def _placed(config: Config, field: str) -> Iterator[tuple[str, Any]]:
    *path, name = field.split(".")
    for prefix, level in _levels(config):
        for part in path:
            level = level.get(part) or {}
        if name in level:
            yield prefix + field, level[name]


def number_of_experts(config: Config) -> int:
    """Return how many routed experts each mixture has; 0 in a dense model."""
    text = text_config(config)
    return int(text.get("num_experts", text.get("num_local_experts")) or 0)


def declares_tied(config: Config) -> bool:
    """Whether Transformers makes the output head the embedding itself, whatever is stored."""
    declared = config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings", False))
    return bool(_family(config).ties and declared)


def _family(config: Config) -> Family:
    return FAMILIES.get(str(config.get("model_type")), Family())


def stored_head(checkpoint: Checkpoint) -> str | None:
    """Return the tensor that is the output head; None if the embedding is: the config says so, or there is no other."""
    if declares_tied(checkpoint.config):
        return None
    names = (f"{head}.weight" for head in _family(checkpoint.config).heads)
    return next((name for name in names if name in checkpoint), None)


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the output head is the embedding itself."""
    return stored_head(checkpoint) is None


def _levels(config: Config) -> list[tuple[str, Config]]:
    """Return the parts of a config on the way to the language model, the outermost first, each with its path."""
    levels = [("", config)]
    for part in ("thinker_config", "text_config"):
        prefix, level = levels[-1]
        if isinstance(inner := level.get(part), Mapping):
            levels.append((f"{prefix}{part}.", inner))
    return levels
