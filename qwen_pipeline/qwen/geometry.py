"""Padding plans: widths that tensor-parallel ranks can share in whole quantization groups.

A rank of a row-parallel layer (``down_proj``, ``o_proj``) holds ``width / tensor_parallel`` input channels. Each rank
has the right scales only if that is a multiple of the group size: 29568 = 231 x 128 serves on one rank, 29696 = 232 x
128 on 2, 4 and 8.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from math import ceil
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import TypeAdapter, ValidationError

from qwen_pipeline.errors import CheckpointRefused, InputRefused
from qwen_pipeline.qwen.config import with_values
from qwen_pipeline.qwen.families import DecoderField, SizeField, TowerField, config_paths
from qwen_pipeline.qwen.layers import (
    head_geometry,
    is_linear_attention,
    layer_matrices,
    number_of_layers,
    required,
    size_fields,
)
from qwen_pipeline.qwen.padding_spec import Layout
from qwen_pipeline.qwen.towers import towers_of

if TYPE_CHECKING:
    import torch

MapLayout = Literal[Layout, "groups"]
"""Layouts of a padding map: those that can be requested, and ``groups``, that of repaired codes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedSize:
    """One size field before and after padding, and the positions of the live channels.

    Attributes:
        field: The config field.
        places: All its paths in the config, such as ``text_config.intermediate_size``.
        group_size: Channels that share a scale; 1 in towers, which are not quantized.
        layout: ``interleave`` puts zero channels between the live ones, so that each quantization group keeps live
            channels; ``append`` puts them last; ``split`` adds no zeros but splits a channel into two; ``groups`` keeps
            live groups whole and spreads whole groups of zeros evenly between them.
        splits: For ``split``: MLP, expert or stack of experts -> a bit for each live channel, in base64, that is set if
            the channel has one part more than the others.
    """

    field: SizeField
    places: tuple[str, ...]
    live: int
    padded: int
    group_size: int
    layout: MapLayout
    splits: Mapping[str, str] = dataclass_field(default_factory=dict[str, str])

    @property
    def zeros(self) -> int:
        """Number of added channels."""
        return self.padded - self.live

    @property
    def of_tower(self) -> bool:
        """Return whether the field is that of a vision or audio tower."""
        return self.field in get_args(TowerField)

    def positions(self) -> "torch.Tensor":
        """Return the padded position of each live channel: int64 ``[live]``, strictly increasing. Not for ``split``.

        Up to one group of zeros is interleaved with the first channels, one zero after each, as in Qwen's GPTQ
        documentation (r0, 0, r1, 0, ..., then the rest): two groups are then half live. More zeros than that are spread
        evenly over all groups.
        """
        import torch

        channels = torch.arange(self.live)
        if self.layout == "append":
            return channels
        if self.layout == "groups":
            group, offset = channels // self.group_size, channels % self.group_size
            return group * self.padded // self.live * self.group_size + offset
        if self.zeros <= self.group_size:
            return channels + channels.clamp(max=self.zeros)
        return channels * self.padded // self.live


@dataclass(frozen=True, slots=True, kw_only=True)
class PadPlan:
    """A padding: the request, and the sizes that follow from it."""

    group_size: int
    tensor_parallel: int
    sizes: tuple[PaddedSize, ...]

    @property
    def changes(self) -> bool:
        """Return whether any size grows; a plan without changes is valid."""
        return any(size.zeros for size in self.sizes)


_PLAN = TypeAdapter(PadPlan)


def dump_plan(plan: PadPlan) -> dict[str, Any]:
    """Return a plan as JSON values, as in ``Manifest.result["padding"]``."""
    sizes = tuple(replace(size, splits=dict(size.splits)) for size in plan.sizes)
    return _PLAN.dump_python(replace(plan, sizes=sizes), mode="json")


def load_plan(value: Mapping[str, Any]) -> PadPlan:
    """Return the plan in a padded checkpoint's ``Manifest.result["padding"]``.

    Raises:
        CheckpointRefused: It is damaged.
    """
    try:
        return _PLAN.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointRefused(
            f"A manifest has a damaged padding plan: {'.'.join(map(str, first['loc']))}: {first['msg']}.",
            remedy="Delete the directory and pad again; the result is the same.",
        ) from error


def plan_padding(
    config: Mapping[str, Any], *, group_size: int, tensor_parallel: int, layout: MapLayout = "interleave"
) -> PadPlan:
    """Return the smallest padding after which every rank of ``tensor_parallel`` holds whole groups of every MLP.

    Routed experts and shared experts have separate sizes. Towers are not padded: see :func:`with_towers`.

    Raises:
        InputRefused: The family is unknown, the config lacks a size or has different values of it, or a number is not
            positive.
    """
    unit = _unit(group_size, tensor_parallel)
    sizes = _sizes(config, lambda _, live: _round_up(live, unit), group_size, layout)
    return PadPlan(group_size=group_size, tensor_parallel=tensor_parallel, sizes=sizes)


def with_towers(plan: PadPlan, config: Mapping[str, Any], *, ranks: int) -> PadPlan:
    """Return the plan with the MLPs of all towers padded too, to the next multiple of ``ranks``.

    Towers are not quantized, so no group has to keep live channels: zeros are appended.

    Raises:
        InputRefused: See :func:`require_towers`.
    """
    require_towers(config, ranks=ranks)
    return replace(plan, sizes=(*plan.sizes, *tower_sizes(config, ranks=ranks)))


def require_towers(config: Mapping[str, Any], *, ranks: int) -> None:
    """Require that padding makes the towers fit ``ranks``.

    Raises:
        InputRefused: The model has no tower, its config lacks a width, or ``ranks`` does not divide a width that is
            derived from other sizes, so that no config field can change it.
    """
    if not (towers := towers_of(config)):
        raise InputRefused(
            f"A model of type {config.get('model_type')} has no vision or audio tower to pad.",
            remedy="Do not request padding of towers.",
        )
    for tower in towers:
        width = tower.width(config)
        if tower.field is None and width % ranks:
            raise InputRefused(
                f"The {tower.part} tower's MLPs have {width} channels, {tower.hidden} times mlp_ratio, which {ranks}"
                " ranks cannot share; no config field can change it.",
                remedy="Serve on a number of ranks that divides the width, or replicate the tower on every rank.",
            )


def tower_sizes(config: Mapping[str, Any], *, ranks: int) -> list[PaddedSize]:
    """Return the smallest multiples of ``ranks`` for all towers whose width a config field states."""
    return list(_tower_sizes(config, lambda _, live: _round_up(live, ranks)))


def plan_between(
    live: Mapping[str, Any], padded: Mapping[str, Any], *, group_size: int, layout: Layout = "interleave"
) -> PadPlan:
    """Return the padding from one config's sizes to the other's; towers are included if they differ."""
    sizes = _sizes(live, lambda size, _: required(padded, size), group_size, layout)
    towers = _tower_sizes(live, lambda size, width: required(padded, size) if config_paths(padded, size) else width)
    return PadPlan(group_size=group_size, tensor_parallel=1, sizes=(*sizes, *(size for size in towers if size.zeros)))


def resized_config(config: Mapping[str, Any], size: PaddedSize, width: int) -> dict[str, Any]:
    """Return the config with one size changed at all its paths."""
    return with_values(config, dict.fromkeys(size.places, width))


def attention_obstacles(config: Mapping[str, Any], *, group_size: int, tensor_parallel: int) -> list[str]:
    """Return the reasons why ranks cannot share attention, as sentences; padding the MLP does not help."""
    if obstacles := head_obstacles(config, tensor_parallel):
        return obstacles
    outputs = [
        matrix
        for layer in range(number_of_layers(config))
        for matrix in layer_matrices(config, layer)
        if matrix.split == "rows" and matrix.size is None
    ]
    return [
        f"{matrix.kind.removeprefix('self_attn.')} has {inputs} inputs per rank, not a multiple of the group size"
        f" {group_size}"
        for matrix in dict.fromkeys(outputs)
        if (inputs := matrix.in_features // tensor_parallel) % group_size
    ]


def head_obstacles(config: Mapping[str, Any], tensor_parallel: int) -> list[str]:
    """Return the reasons why ranks cannot share the heads, as sentences.

    Key-value heads are replicated if there are fewer of them than ranks, as in vLLM and SGLang.
    """
    heads, kv_heads, _ = head_geometry(config)
    obstacles: list[str] = []
    if heads % tensor_parallel:
        obstacles.append(f"{heads} attention heads are not divisible by {tensor_parallel}")
    if kv_heads % tensor_parallel and tensor_parallel % kv_heads:
        obstacles.append(f"{kv_heads} key-value heads can be neither divided nor replicated over {tensor_parallel}")
    if any(is_linear_attention(config, layer) for layer in range(number_of_layers(config))):
        counts = {kind: required(config, f"linear_num_{kind}_heads") for kind in ("key", "value")}
        obstacles += [
            f"{count} linear-attention {kind} heads are not divisible by {tensor_parallel}"
            for kind, count in counts.items()
            if count % tensor_parallel
        ]
    return obstacles


def _tower_sizes(config: Mapping[str, Any], padded: Callable[[SizeField, int], int]) -> Iterator[PaddedSize]:
    for tower in towers_of(config):
        if (field := tower.field) and (paths := config_paths(config, field)):
            live = required(config, field)
            yield PaddedSize(
                field=field, places=paths, live=live, padded=padded(field, live), group_size=1, layout="append"
            )


def _sizes(
    config: Mapping[str, Any], padded: Callable[[DecoderField, int], int], group_size: int, layout: MapLayout
) -> tuple[PaddedSize, ...]:
    widths: dict[DecoderField, int] = {size: required(config, size) for size in size_fields(config)}
    return tuple(
        PaddedSize(
            field=size,
            places=config_paths(config, size),
            live=live,
            padded=padded(size, live),
            group_size=group_size,
            layout=layout,
        )
        for size, live in widths.items()
    )


def _unit(group_size: int, tensor_parallel: int) -> int:
    if group_size > 0 and tensor_parallel > 0:
        return group_size * tensor_parallel
    raise InputRefused(
        f"Group size {group_size} and tensor-parallel degree {tensor_parallel} must both be positive.",
        remedy="Pass the group size of the quantization and the number of ranks, such as 128 and 8.",
    )


def _round_up(width: int, unit: int) -> int:
    return ceil(width / unit) * unit
