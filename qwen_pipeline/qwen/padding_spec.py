"""The spec of a padding. This module imports little: the command line's help and the settings show its defaults."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm
from typing import Any, Literal

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.methods import Method

Layout = Literal["interleave", "append", "split"]
DEFAULT_LAYOUT: Layout = "split"
"""The layout with which padded models quantize best (``docs/numerics.md``)."""

MAX_RANKS = 1024
"""Ranks of the largest deployment that is planned for; the work of a simulation grows with them."""
Targets = Mapping[str, Sequence[int]]
"""Serving engine -> the tensor-parallel degrees at which it must serve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddingSpec:
    """The width that MLPs are padded to, and the layout of their new channels.

    Attributes:
        group_size: Consecutive input channels that will share one scale.
        tensor_parallel: Ranks, each of which gets whole quantization groups of every MLP.
        targets: Engines and degrees to serve, in place of ``tensor_parallel``: MLPs become no wider than these need.
        layout: Content and position of the new channels: halves of live ones, or zeros between or after the live ones.
        towers: Whether the MLPs of vision and audio towers are padded too, to widths that all ranks can share.
        method: The quantization that follows, whose rules decide for ``targets``.
    """

    group_size: int = 128
    tensor_parallel: int = 8
    targets: Targets = field(default_factory=dict[str, Sequence[int]])
    layout: Layout = DEFAULT_LAYOUT
    towers: bool = False
    method: Method = "gptq"

    def __post_init__(self) -> None:
        for degree in (self.tensor_parallel, *(each for degrees in self.targets.values() for each in degrees)):
            require_ranks(degree)

    @property
    def degrees(self) -> list[int]:
        """All requested degrees, ascending.

        Raises:
            InputRefused: A target has no degree.
        """
        return served_degrees(self.targets) if self.targets else [self.tensor_parallel]

    @property
    def ranks(self) -> int:
        """The least common multiple of the degrees."""
        return lcm(*self.degrees)

    def to_json(self) -> dict[str, Any]:
        """Return the fields that identify a padding in manifests; those not in use are left out.

        The method only matters with targets: without, quantizations in the same groups share a padding.
        """
        targets = {engine: list(degrees) for engine, degrees in self.targets.items()}
        served: dict[str, Any] = {"targets": targets} if targets else {"tensor_parallel": self.tensor_parallel}
        towers = {"towers": True} if self.towers else {}
        method = {"method": self.method} if targets and self.method != "gptq" else {}
        return {"group_size": self.group_size, "layout": self.layout, **served, **towers, **method}


def require_ranks(degree: int) -> int:
    """Return a number of ranks.

    Raises:
        InputRefused: It is not from 1 to :data:`MAX_RANKS`.
    """
    if not 1 <= degree <= MAX_RANKS:
        raise InputRefused(f"{degree} ranks were requested, expected 1 to {MAX_RANKS}.", remedy="Request fewer ranks.")
    return degree


def served_degrees(targets: Targets) -> list[int]:
    """Return every degree of the targets, ascending.

    Raises:
        InputRefused: There is no engine, or an engine has no degree.
    """
    degrees = sorted({degree for requested in targets.values() for degree in requested})
    if not degrees or not all(targets.values()):
        raise InputRefused(
            f"Targets must give each engine at least one degree, got {dict(targets)}.",
            remedy="Pass an engine and its degrees, such as vllm at 8.",
        )
    return degrees
