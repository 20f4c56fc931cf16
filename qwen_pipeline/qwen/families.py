"""The dense Qwen families: where their sizes are written, how their tensors are named, what stored names mean.

Transformers keeps a vision-language model's decoder at ``model.language_model``; Qwen2-VL and Qwen2.5-VL are published
(and saved) with it at ``model`` and the vision tower at ``visual``. Both spellings name the same tensor.
"""

import re
from collections import Counter
from collections.abc import Container, Mapping
from typing import Any

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import CheckpointRefused, InputRefused, listed

Config = Mapping[str, Any]

DENSE = ("qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Values of ``model_type`` whose every decoder layer has one gated MLP and full attention."""

_MODULE_SPELLINGS = (
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

_MLP = re.compile(
    r"model\.(?:language_model\.)?layers\.(?P<layer>\d+)\.mlp"
    rf"\.(?P<tensor>(?:{'|'.join(PROJECTIONS)})\.(?:weight|bias))"
)
_CHANNEL_AXIS = {
    "gate_proj.weight": 0,
    "gate_proj.bias": 0,
    "up_proj.weight": 0,
    "up_proj.bias": 0,
    "down_proj.weight": 1,
}


def text_config(config: Config) -> Config:
    """Return the part of a config that describes the language model."""
    return config.get("text_config", config)


def places_of(config: Config, field: str) -> tuple[str, ...]:
    """Return every place of the language model's ``field``, such as ``text_config.intermediate_size``.

    A vision-language config may repeat it at the top; the vision tower's field of the same name is not among them.
    """
    nested = ("text_config." + field,) if field in config.get("text_config", {}) else ()
    return ((field,) if field in config else ()) + nested


def require_dense(config: Config) -> str:
    """Return ``model_type`` of a dense Qwen family.

    Raises:
        InputRefused: It is another family; the message says what its layers have that this version cannot pad.
    """
    family, text = str(config.get("model_type")), text_config(config)
    if any("expert" in field for field in text):
        obstacle = "its MLPs are mixtures of experts"
    elif "linear_attention" in text.get("layer_types", ()):
        obstacle = "its layers mix linear and full attention"
    elif family not in DENSE:
        obstacle = "its tensor names are not known here"
    else:
        return family
    raise InputRefused(
        f"Models of type {family!r} cannot be padded by this version: {obstacle}.",
        remedy=f"Use a model of one of the families {', '.join(DENSE)}, or quantize this one without padding.",
    )


def require_mlp_tensors(checkpoint: Checkpoint, width: int) -> dict[str, int]:
    """Return the tensors of a dense checkpoint that have the MLP's channels: name -> the axis that counts them.

    Args:
        checkpoint: A checkpoint of a dense family.
        width: The channels that every layer's MLP must have.

    Raises:
        CheckpointRefused: A projection is missing, is there twice or has another width; the message names them.
    """
    matches = {name: match for name in checkpoint if (match := _MLP.fullmatch(name))}
    axes = {name: _CHANNEL_AXIS[m["tensor"]] for name, m in matches.items() if m["tensor"] in _CHANNEL_AXIS}
    roles = {name: f"layers.{m['layer']}.mlp.{m['tensor']}" for name, m in matches.items()}
    held = Counter(roles.values())
    layers = range(int(text_config(checkpoint.config)["num_hidden_layers"]))
    expected = [f"layers.{n}.mlp.{projection}.weight" for n in layers for projection in PROJECTIONS]
    wrong = [f"{role} is missing" for role in expected if role not in held]
    wrong += [f"{name} is one of {held[role]} spellings of it" for name, role in roles.items() if held[role] > 1]
    wrong += [f"{n} is {list(checkpoint[n].shape)}" for n, axis in axes.items() if checkpoint[n].shape[axis] != width]
    if wrong:
        raise CheckpointRefused(
            f"The MLP weights do not fit {len(layers)} layers of intermediate_size {width}: {listed(wrong)}.",
            remedy="Fetch the checkpoint again, or correct its config: weights and config must be of one model.",
        )
    return axes


def stored_names(module: str, checkpoint: Container[str]) -> list[str]:
    """Return the weights in ``checkpoint`` that the module path of a model in memory can stand for."""
    spellings = {f"{module}.weight"}
    for new, old in _MODULE_SPELLINGS:
        spellings |= {f"{old}{module.removeprefix(new)}.weight"} if module.startswith(new) else set()
        spellings |= {f"{new}{module.removeprefix(old)}.weight"} if module.startswith(old) else set()
    return sorted(name for name in spellings if name in checkpoint)


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the output head is the embedding itself: the config says so, or there is no tensor for it."""
    config = checkpoint.config
    declared = config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings", False))
    return bool(declared) or "lm_head.weight" not in checkpoint
