"""Tensors with the channels of a size field, and the axis of these channels.

They are outputs of gate and up and inputs of down; stacks of experts have them for all experts at once. Towers have
other names for these layers.
"""

from collections.abc import Collection
from dataclasses import dataclass

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import CheckpointRefused, listed
from qwen_pipeline.qwen.families import Config, DecoderField, SizeField
from qwen_pipeline.qwen.layers import mlp_matrices, number_of_layers, required
from qwen_pipeline.qwen.names import DOWN, FUSED, ParsedName, parse_names, stack_of
from qwen_pipeline.qwen.towers import towers_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Channels:
    """The channels of a size field in a tensor.

    Attributes:
        field: The config field that counts the channels.
        axis: The tensor's axis of channels.
        halves: 2 if gate channels and up channels follow each other on that axis, else 1.
    """

    field: SizeField
    axis: int
    halves: int = 1


def sized_tensors(checkpoint: Checkpoint, field: SizeField) -> dict[str, Channels]:
    """Return the tensors of the decoder and the draft head, or of a tower, that have the channels of ``field``.

    Raises:
        InputRefused: The family is unknown, or the config has different values of ``field``.
        CheckpointRefused: A projection is missing, is stored twice or does not have the width in the config, or
            a tensor is unknown; the message names them.
    """
    config, names = checkpoint.config, parse_names(checkpoint)
    width = required(config, field)
    found = {
        name: channels
        for parsed, name in names.items()
        if (channels := channels_of(parsed, checkpoint[name].shape, config)) and channels.field == field
    }
    wrong = [f"{role} is missing" for role in _missing(names, config, field)]
    wrong += [
        f"{name} is {list(checkpoint[name].shape)}"
        for name, channels in found.items()
        if checkpoint[name].shape[channels.axis] != channels.halves * width
    ]
    if wrong:
        raise CheckpointRefused(
            f"The weights do not match {field} {width} of the config: {listed(wrong)}.",
            remedy="Fetch the checkpoint again, or correct its config: weights and config must belong to one model.",
        )
    return found


def channels_of(parsed: ParsedName, shape: tuple[int, ...], config: Config) -> Channels | None:
    """Return the channels of a size field in a full-precision tensor of this shape; None if it has none.

    Stacks of experts are [E, 2I, H] and [E, H, I], or [E, H, 2I] and [E, I, H]. The former is assumed wherever the
    shape allows it, as in Transformers (``Transpose(check_dims=True)``).
    """
    if parsed.parameter not in ("weight", "bias"):
        return None
    if parsed.part in ("vision", "audio"):
        return _tower_channels(parsed, config)
    if parsed.part not in ("decoder", "mtp"):
        return None
    if parsed.module in FUSED:
        return _stacked_channels(parsed.module, shape, required(config, "hidden_size"))
    owner, _, projection = parsed.module.rpartition(".")
    size_field = _size_field(owner) if projection in _PROJECTIONS else None  # routers have no such channels
    if size_field is None or (parsed.parameter == "bias" and projection == "down_proj"):
        return None
    return Channels(field=size_field, axis=1 if projection == "down_proj" else 0)


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _tower_channels(parsed: ParsedName, config: Config) -> Channels | None:
    for tower in towers_of(config):
        axis = tower.axis(parsed.module)
        if tower.field and axis is not None and (axis == 0 or parsed.parameter == "weight"):
            return Channels(field=tower.field, axis=axis)
    return None


def _size_field(owner: str) -> DecoderField | None:
    if owner == "mlp":
        return "intermediate_size"
    if owner == "mlp.shared_expert":
        return "shared_expert_intermediate_size"
    return "moe_intermediate_size" if owner.startswith("mlp.experts") else None


def _stacked_channels(module: str, shape: tuple[int, ...], hidden_size: int) -> Channels:
    field: DecoderField = "moe_intermediate_size"
    if module == DOWN:
        return Channels(field=field, axis=2 if shape[1] == hidden_size else 1)
    return Channels(field=field, axis=1 if shape[2] == hidden_size else 2, halves=2)


def _missing(names: Collection[ParsedName], config: Config, field: SizeField) -> list[str]:
    """Return the weights that layers lack, both one by one and in stacks."""
    if tower := next((tower for tower in towers_of(config) if tower.field == field), None):
        held = {parsed.module for parsed in names if parsed.parameter == "weight"}
        return [f"{module}.weight" for module in tower.linears(config) if module not in held]
    modules = {(parsed.layer, parsed.module) for parsed in names if parsed.part == "decoder"}
    return [
        f"layers.{layer}.{kind}.weight"
        for layer in range(number_of_layers(config))
        for matrix in mlp_matrices(config, layer)
        if matrix.size == field
        for kind in matrix.kinds()
        if (layer, kind) not in modules and (layer, stack_of(kind)) not in modules
    ]
