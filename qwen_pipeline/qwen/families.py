"""The Qwen families, as data: the parts of their layers, the paths of sizes in their configs, their tensor names.

The tables were read from Transformers 5.23 (``models/qwen*/configuration_*.py`` and ``modeling_*.py``,
``conversion_mapping.py``); a test compares them with every family of the installed Transformers. A family that is not
listed is refused: nothing is inferred from the form of a config.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import InputRefused

Config = Mapping[str, Any]
DecoderField = Literal["intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"]
TowerField = Literal["vision_config.intermediate_size", "audio_config.encoder_ffn_dim"]
SizeField = Literal[DecoderField, TowerField]
"""The sizes that padding may change, those of towers on request; ``hidden_size`` never changes."""
ModelPart = Literal["decoder", "embedding", "norm", "head", "mtp", "vision", "audio", "talker", "vocoder"]
"""The part of a model that owns a tensor. ``mtp`` is a draft head whose layers are built from the decoder's config."""
Mixer = Literal["attention", "next", "3.5", "4"]
"""Token mixers: full attention alone, or also gated delta nets (as in Qwen3-Next, Qwen3.5, Qwen4)."""

TIED = "tie_word_embeddings"
_VISION: Mapping[str, ModelPart] = {"visual.": "vision", "model.visual.": "vision"}
_AUDIO: Mapping[str, ModelPart] = {
    f"{prefix}{tower}.": "audio" for prefix in ("", "model.") for tower in ("audio_tower", "multi_modal_projector")
}
_BARE = ("model.", "")
"""Published embedding models are saved without their head, and so without the prefix ``model.``."""
_DECODER = ("model.language_model.", "model.", "language_model.", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One value of ``model_type``.

    Attributes:
        mixer: Token mixer.
        experts: Whether layers may be mixtures of experts (``num_experts``, ``moe_intermediate_size``).
        shared: Whether such a layer has a shared expert (``shared_expert_intermediate_size``).
        decoder: Prefixes of decoder tensors on disk or in memory.
        heads: Names of the output head, without ``.weight``.
        towers: Prefix of tensors outside the decoder -> the part that owns them.
        head_dim: Default of the config field; 0 means ``hidden_size // num_attention_heads``.
        drafts: Whether published checkpoints have a multi-token prediction head at ``mtp.``.
        ties: Whether ``tie_word_embeddings`` has a meaning (``_tied_weights_keys`` of the model's class).
        ties_by_default: The meaning of a config without ``tie_word_embeddings``.
        ties_by_text: Whether the text section alone can declare the head tied (``__post_init__`` of the config).
        scored: Beginning of the names of Transformers' classes with a ``score`` in place of the output head; empty if
            models with other heads are not supported.
    """

    mixer: Mixer = "attention"
    experts: bool = False
    shared: bool = False
    decoder: tuple[str, ...] = _BARE
    heads: tuple[str, ...] = ("lm_head",)
    towers: Mapping[str, ModelPart] = field(default_factory=dict[str, ModelPart])
    head_dim: int = 0
    drafts: bool = False
    ties: bool = True
    ties_by_default: bool = False
    ties_by_text: bool = False
    scored: str = ""


def _thinker(towers: Mapping[str, ModelPart], **rest: Any) -> Family:
    """Return the family of a thinker, alone or in its omni model: one file may contain both spellings."""
    spelled: dict[str, ModelPart] = {
        prefix + tower: part for tower, part in towers.items() for prefix in ("thinker.", "")
    }
    return Family(
        decoder=("thinker.model.language_model.", "thinker.model.", *_DECODER),
        heads=("thinker.lm_head", "lm_head"),
        towers={**spelled, "talker.": "talker", "token2wav.": "vocoder", "code2wav.": "vocoder"},
        **rest,
    )


_VL = Family(decoder=_DECODER, towers=_VISION, ties_by_text=True)
_OMNI_2_5 = _thinker({**_VISION, **_AUDIO})
_OMNI_3 = _thinker({**_VISION, **_AUDIO}, experts=True)
_TEXT_3_5 = Family(mixer="3.5", decoder=_DECODER, towers=_VISION, head_dim=256, drafts=True)
_COMPOSITE_3_5 = replace(_TEXT_3_5, scored="Qwen3_5")
_TEXT_3_5_MOE = Family(
    mixer="3.5", experts=True, shared=True, decoder=_DECODER, towers=_VISION, head_dim=256, drafts=True
)
_TEXT_4 = Family(mixer="4", experts=True, shared=True, decoder=_DECODER, towers=_VISION, head_dim=256, drafts=True)

FAMILIES: Mapping[str, Family] = {
    "qwen2": Family(scored="Qwen2"),
    "qwen2_moe": Family(experts=True, shared=True, scored="Qwen2Moe"),
    "qwen2_vl": _VL,
    "qwen2_5_vl": _VL,
    "qwen2_5_omni": _OMNI_2_5,
    "qwen2_5_omni_thinker": _OMNI_2_5,
    "qwen2_audio": Family(
        decoder=("language_model.model.", *_DECODER),
        heads=("language_model.lm_head", "lm_head"),
        towers=_AUDIO,
        ties=False,
    ),
    "qwen3": Family(head_dim=128, scored="Qwen3"),
    "qwen3_moe": Family(experts=True, scored="Qwen3Moe"),
    "qwen3_next": Family(mixer="next", experts=True, shared=True, head_dim=256, drafts=True, scored="Qwen3Next"),
    "qwen3_vl": Family(decoder=_DECODER, towers=_VISION, head_dim=128),
    "qwen3_vl_moe": Family(experts=True, decoder=_DECODER, towers=_VISION),
    "qwen3_omni_moe": _OMNI_3,
    "qwen3_omni_moe_thinker": _OMNI_3,
    "qwen3_asr": Family(decoder=_DECODER, towers=_AUDIO, head_dim=128, ties_by_default=True),
    "qwen3_5": _COMPOSITE_3_5,
    "qwen3_5_text": _TEXT_3_5,
    "qwen3_5_moe": _TEXT_3_5_MOE,
    "qwen3_5_moe_text": _TEXT_3_5_MOE,
    "qwen4_exp": _TEXT_4,
    "qwen4_exp_text": _TEXT_4,
}

ARCHITECTURES: Mapping[str, tuple[str, ...]] = {
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Model"),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeModel"),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", "Qwen2VLModel"),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel"),
    "qwen2_5_omni": ("Qwen2_5OmniForConditionalGeneration",),
    "qwen2_5_omni_thinker": ("Qwen2_5OmniThinkerForConditionalGeneration",),
    "qwen2_audio": ("Qwen2AudioForConditionalGeneration", "Qwen2AudioModel"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Model"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
    "qwen3_next": ("Qwen3NextForCausalLM", "Qwen3NextModel"),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", "Qwen3VLModel"),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeModel"),
    "qwen3_omni_moe": ("Qwen3OmniMoeForConditionalGeneration",),
    "qwen3_omni_moe_thinker": ("Qwen3OmniMoeThinkerForConditionalGeneration",),
    "qwen3_asr": ("Qwen3ASRForConditionalGeneration", "Qwen3ASRModel"),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", "Qwen3_5Model"),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", "Qwen3_5TextModel"),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeModel"),
    "qwen3_5_moe_text": ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextModel"),
    "qwen4_exp": ("Qwen4ExpForConditionalGeneration", "Qwen4ExpModel"),
    "qwen4_exp_text": ("Qwen4ExpForCausalLM", "Qwen4ExpTextModel"),
}
"""Model type -> classes of Transformers that have its tensors and no others, that with an output head first."""


def require_family(config: Config) -> Family:
    """Return the family of the config's ``model_type``.

    Raises:
        InputRefused: The model type is not supported.
    """
    name = str(config.get("model_type"))
    if name in FAMILIES:
        return FAMILIES[name]
    raise InputRefused(
        f"The model type {name!r} is not supported: tensor names and sizes are known for Qwen families only.",
        remedy=f"Use a model of one of the types {', '.join(FAMILIES)}.",
    )


def text_config(config: Config) -> Config:
    """Return the section of a config that describes the language model; the config itself if it has no sections."""
    return _sections(config)[-1][1]


def text_prefix(config: Config) -> str:
    """Return the path of :func:`text_config`, such as ``thinker_config.text_config.``; empty for the config itself."""
    return _sections(config)[-1][0]


def config_paths(config: Config, field: str) -> tuple[str, ...]:
    """Return all paths of the language model's ``field``, such as ``thinker_config.text_config.intermediate_size``.

    A vision-language config may repeat the field at the top. A field of a tower is named with its section, such as
    ``vision_config.intermediate_size``.
    """
    return tuple(path for path, _ in _occurrences(config, field))


def config_items(config: Config, field: str) -> dict[str, Any]:
    """Return path -> value at :func:`config_paths`."""
    return dict(_occurrences(config, field))


def config_values(config: Config, field: str) -> set[Any]:
    """Return the distinct values at :func:`config_paths`; a valid config has one."""
    return {value for _, value in _occurrences(config, field)}


def has_section(config: Config, name: str) -> bool:
    """Return whether the config, or a section around the language model, has a section such as ``vision_config``."""
    return any(value for _, value in _occurrences(config, name))


def _occurrences(config: Config, field: str) -> Iterator[tuple[str, Any]]:
    *path, name = field.split(".")
    for prefix, section in _sections(config):
        for part in path:
            section = section.get(part) or {}
        if name in section:
            yield prefix + field, section[name]


def number_of_experts(config: Config) -> int:
    """Return the number of routed experts of each mixture; 0 for a dense model."""
    text = text_config(config)
    return int(text.get("num_experts", text.get("num_local_experts")) or 0)


def declares_tied(config: Config) -> bool:
    """Return whether Transformers ties the output head to the embedding, unless a head with other values is stored."""
    family, owner, text = _family(config), _head_owner(config)[1], text_config(config)
    declared = owner.get(TIED, family.ties_by_default) or (family.ties_by_text and text.get(TIED))
    return bool(family.ties and declared)


def tie_paths(config: Config) -> tuple[str, ...]:
    """Return all paths at which loaders read ``tie_word_embeddings``: Transformers one of them, engines others."""
    return tuple(dict.fromkeys((TIED, f"{_head_owner(config)[0]}{TIED}", *config_paths(config, TIED))))


def _head_owner(config: Config) -> tuple[str, Config]:
    """Return the section of the model that has the output head, which is around the text section, with its path."""
    sections = _sections(config)
    return sections[-2] if len(sections) > 1 else sections[-1]


def _family(config: Config) -> Family:
    return FAMILIES.get(str(config.get("model_type")), Family())


def stored_head(checkpoint: Checkpoint) -> str | None:
    """Return the name of the stored output head; None if the embedding is used, as tied or for lack of a head."""
    if declares_tied(checkpoint.config):
        return None
    names = (f"{head}.weight" for head in _family(checkpoint.config).heads)
    return next((name for name in names if name in checkpoint), None)


def is_tied(checkpoint: Checkpoint) -> bool:
    """Return whether the output head is the embedding."""
    return stored_head(checkpoint) is None


def _sections(config: Config) -> list[tuple[str, Config]]:
    """Return the nested sections of a config down to the language model, the outermost first, each with its path."""
    sections = [("", config)]
    for name in ("thinker_config", "text_config"):
        prefix, section = sections[-1]
        if isinstance(inner := section.get(name), Mapping):
            sections.append((f"{prefix}{name}.", inner))
    return sections
