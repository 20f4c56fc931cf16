"""Feasibility of tensor-parallel degrees for an unpadded model: sizes, and groups that straddle ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from qwen_pipeline.qwen.families import Config, SizeField
from qwen_pipeline.qwen.geometry import attention_obstacles, plan_padding
from qwen_pipeline.qwen.tensor_parallel.engines import distinct_matrices


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeFeasibility:
    """One size field at one tensor-parallel degree.

    Attributes:
        live: Channels before padding.
        target: Channels after padding for this degree.
        groups_per_rank: Quantization groups of ``down_proj`` on each rank, before and after padding. With a fraction,
            groups straddle ranks.
    """

    field: SizeField
    live: int
    target: int
    groups_per_rank: tuple[float, float]

    @property
    def extra_percent(self) -> float:
        """Growth of the MLPs of this size, in percent."""
        return 100 * (self.target - self.live) / self.live


@dataclass(frozen=True, slots=True, kw_only=True)
class DegreeFeasibility:
    """One model at one tensor-parallel degree.

    Attributes:
        sizes: Every size field.
        legal: Whether the padded model serves at this degree: heads and ``o_proj`` divide too.
        sentence: The result in words.
    """

    degree: int
    sizes: tuple[SizeFeasibility, ...]
    legal: bool
    sentence: str

    @property
    def whole(self) -> bool:
        """Whether ranks hold whole groups of every MLP without padding."""
        return all(size.target == size.live for size in self.sizes)


def assess_degrees(config: Mapping[str, Any], *, group_size: int, degrees: Sequence[int]) -> list[DegreeFeasibility]:
    """Return the feasibility of each tensor-parallel degree, infeasible ones included."""
    return [_assess_degree(config, group_size, degree) for degree in degrees]


def _assess_degree(config: Mapping[str, Any], group_size: int, degree: int) -> DegreeFeasibility:
    sizes = plan_padding(config, group_size=group_size, tensor_parallel=degree).sizes
    obstacles = attention_obstacles(config, group_size=group_size, tensor_parallel=degree)
    padded = [f"{size.field} from {size.live} to {size.padded}" for size in sizes if size.zeros]
    if obstacles:
        sentence = f"Cannot serve: {'; '.join(obstacles)}."
    elif not padded:
        sentence = "Serves without padding."
    else:
        sentence = f"Groups straddle ranks; pad {' and '.join(padded)} before quantizing."
    return DegreeFeasibility(
        degree=degree,
        sizes=tuple(
            SizeFeasibility(
                field=size.field,
                live=size.live,
                target=size.padded,
                groups_per_rank=(size.live / group_size / degree, size.padded / group_size / degree),
            )
            for size in sizes
        ),
        legal=not obstacles,
        sentence=sentence,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """The inputs of one kind of row-parallel layer, such as ``mlp.down_proj``, divided over ranks."""

    kind: str
    inputs: int
    group_size: int
    ranks: int

    @property
    def groups_per_rank(self) -> float:
        """Quantization groups on each rank. With a fraction, groups straddle ranks."""
        return self.inputs / self.group_size / self.ranks

    @property
    def is_cut(self) -> list[bool]:
        """Whether the end of each rank but the last lies inside a group."""
        return [self.inputs * rank % (self.group_size * self.ranks) != 0 for rank in range(1, self.ranks)]

    @property
    def straddling(self) -> set[int]:
        """Numbers of the groups that lie on more than one rank."""
        ends = (self.inputs * rank / self.ranks for rank in range(1, self.ranks))
        return {ceil(end / self.group_size) - 1 for end in ends if end % self.group_size}

    def groups(self) -> list[tuple[int, int]]:
        """Return each group's first input and number of inputs; the last one may have fewer."""
        starts = range(0, self.inputs, self.group_size)
        return [(start, min(self.group_size, self.inputs - start)) for start in starts]


def divisions(config: Config, *, group_size: int, ranks: int) -> list[Division]:
    """Return the division of each kind of quantized row-parallel layer."""
    shared = [matrix for matrix in distinct_matrices(config) if matrix.quantized and matrix.split == "rows"]
    widths = dict.fromkeys((matrix.kind, matrix.in_features) for matrix in shared)
    return [Division(kind=kind, inputs=inputs, group_size=group_size, ranks=ranks) for kind, inputs in widths]
