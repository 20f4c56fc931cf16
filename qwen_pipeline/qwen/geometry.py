"""Sizes: which widths tensor-parallel ranks can share in whole quantization groups, and how a width is padded to one.

A rank of a row-parallel layer (``down_proj``, ``o_proj``) holds ``width / tensor_parallel`` input channels. Group
scales stay right only if that is a multiple of the group size: 29568 = 231 x 128 serves one rank, 29696 = 232 x 128
serves 2, 4 and 8.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.families import places_of, require_dense, text_config

if TYPE_CHECKING:
    import torch

Layout = Literal["interleave", "append"]
WIDTH = "intermediate_size"
"""The only size that padding moves; ``hidden_size`` never does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedSize:
    """One size field before and after, and where the live channels went.

    Attributes:
        field: Name of the config field.
        places: Every place of it in the config, such as ``text_config.intermediate_size``.
        layout: ``interleave`` puts zero channels between the first live ones, so that each quantization group keeps
            live channels; ``append`` puts them last.
    """

    field: str
    places: tuple[str, ...]
    live: int
    padded: int
    layout: Layout

    @property
    def zeros(self) -> int:
        return self.padded - self.live

    def positions(self) -> "torch.Tensor":
        """Return the padded position of each live channel: int64 ``[live]``, strictly increasing.

        Interleaving at most ``live`` zeros puts one after each of the first channels, which is the procedure of Qwen's
        GPTQ documentation (r0, 0, r1, 0, ..., then the rest); more zeros than that are spread evenly.
        """
        import torch

        channels = torch.arange(self.live)
        if self.layout == "append":
            return channels
        if self.zeros <= self.live:
            return channels + channels.clamp(max=self.zeros)
        return channels + channels * self.zeros // self.live


@dataclass(frozen=True, slots=True, kw_only=True)
class PadPlan:
    """What padding does to a model: the request, and each size that follows from it."""

    group_size: int
    tensor_parallel: int
    sizes: tuple[PaddedSize, ...]

    @property
    def changes(self) -> bool:
        """Whether any size grows; a plan that changes nothing is valid."""
        return any(size.zeros for size in self.sizes)


_PLAN = TypeAdapter(PadPlan)


def dump_plan(plan: PadPlan) -> dict[str, Any]:
    """Return a plan as JSON values, the form it has in ``Manifest.result["padding"]``."""
    return _PLAN.dump_python(plan, mode="json")


def load_plan(value: Mapping[str, Any]) -> PadPlan:
    """Return the plan of a padded checkpoint's ``Manifest.result["padding"]``."""
    return _PLAN.validate_python(value)


def plan_padding(
    config: Mapping[str, Any], *, group_size: int, tensor_parallel: int, layout: Layout = "interleave"
) -> PadPlan:
    """Return the smallest padding after which every rank of ``tensor_parallel`` holds whole groups of the MLP.

    Raises:
        InputRefused: The family cannot be padded, the config's sizes disagree, or a number is not positive.
    """
    require_dense(config)
    unit = _unit(group_size, tensor_parallel)
    live = _width(config)
    size = PaddedSize(
        field=WIDTH, places=places_of(config, WIDTH), live=live, padded=_round_up(live, unit), layout=layout
    )
    return PadPlan(group_size=group_size, tensor_parallel=tensor_parallel, sizes=(size,))


@dataclass(frozen=True, slots=True, kw_only=True)
class DegreeOutlook:
    """What one tensor-parallel degree means for a model.

    Attributes:
        live: MLP channels now.
        target: MLP channels after padding for this degree.
        groups_per_rank: Quantization groups of ``down_proj`` on each rank, now and after; a fraction is what breaks.
        legal: Whether the padded model serves at this degree: heads and ``o_proj`` divide too.
        sentence: What would happen, for a reader.
    """

    degree: int
    live: int
    target: int
    groups_per_rank: tuple[float, float]
    legal: bool
    sentence: str

    @property
    def extra_percent(self) -> float:
        """How much wider the MLPs become."""
        return 100 * (self.target - self.live) / self.live


def outlook(config: Mapping[str, Any], *, group_size: int, degrees: Sequence[int]) -> list[DegreeOutlook]:
    """Return what each tensor-parallel degree would mean, the illegal ones included."""
    require_dense(config)
    live = _width(config)
    return [_outlook(config, live, group_size, degree) for degree in degrees]


def attention_obstacles(config: Mapping[str, Any], *, group_size: int, tensor_parallel: int) -> list[str]:
    """Return why attention cannot be shared by the ranks, in words; padding the MLP helps none of it.

    Key-value heads are replicated where there are fewer of them than ranks, as vLLM and SGLang do.
    """
    text = text_config(config)
    heads = int(text["num_attention_heads"])
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head_dim = int(text.get("head_dim") or int(text["hidden_size"]) // heads)
    obstacles: list[str] = []
    if heads % tensor_parallel:
        obstacles.append(f"{heads} attention heads do not divide by {tensor_parallel}")
    if kv_heads % tensor_parallel and tensor_parallel % kv_heads:
        obstacles.append(f"{kv_heads} key-value heads can neither be divided nor replicated over {tensor_parallel}")
    if not obstacles and (heads * head_dim // tensor_parallel) % group_size:
        inputs = heads * head_dim // tensor_parallel
        obstacles.append(f"o_proj has {inputs} inputs per rank, not a multiple of the group size {group_size}")
    return obstacles


def _outlook(config: Mapping[str, Any], live: int, group_size: int, degree: int) -> DegreeOutlook:
    target = _round_up(live, _unit(group_size, degree))
    obstacles = attention_obstacles(config, group_size=group_size, tensor_parallel=degree)
    if obstacles:
        sentence = f"Cannot serve: {'; '.join(obstacles)}."
    elif target == live:
        sentence = "Serves as it is."
    else:
        sentence = f"Breaks as it is; pad {live} to {target} before quantizing."
    return DegreeOutlook(
        degree=degree,
        live=live,
        target=target,
        groups_per_rank=(live / group_size / degree, target / group_size / degree),
        legal=not obstacles,
        sentence=sentence,
    )


def _width(config: Mapping[str, Any]) -> int:
    """Return the MLP width that every place of it in the config agrees on."""
    found = {part[WIDTH] for part in (config, text_config(config)) if WIDTH in part}
    if len(found) == 1 and isinstance(width := found.pop(), int) and width > 0:
        return width
    places = ", ".join(places_of(config, WIDTH)) or "nowhere"
    raise InputRefused(
        f"{WIDTH} must be one positive number; it is in {places}: {sorted(map(str, found))}.",
        remedy="Correct config.json: the width of the MLP weights is right.",
    )


def _unit(group_size: int, tensor_parallel: int) -> int:
    if group_size > 0 and tensor_parallel > 0:
        return group_size * tensor_parallel
    raise InputRefused(
        f"Group size {group_size} and tensor-parallel degree {tensor_parallel} must both be positive.",
        remedy="Name the group size that quantization will use and the ranks that will serve, such as 128 and 8.",
    )


def _round_up(width: int, unit: int) -> int:
    return ceil(width / unit) * unit
