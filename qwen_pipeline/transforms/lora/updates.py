"""Every low-rank update of a set of adapters, by the parameter in memory that it belongs to."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen_pipeline.errors import AdapterRefused
from qwen_pipeline.transforms.lora.adapter import Adapter
from qwen_pipeline.transforms.lora.adapter_set import AdapterSet, Combination, Member
from qwen_pipeline.transforms.lora.adapter_tensors import Factors
from qwen_pipeline.transforms.lora.low_rank import LowRank, SavedFactors

if TYPE_CHECKING:
    import torch

Use = tuple[Adapter, str]
"""A tensor of an adapter, by its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What is added to one parameter in memory: ``scaling * up @ down`` for each of its matrices.

    Attributes:
        shape: Of one matrix.
        uses: The tensors that it is made of.
    """

    member: Member
    factors: Factors
    low_rank: LowRank
    scaling: float
    experts: int
    shape: tuple[int, ...]
    uses: tuple[Use, ...]

    @property
    def adapter(self) -> Adapter:
        return self.member.adapter


@dataclass(frozen=True, slots=True)
class FactorSum(LowRank):
    """Factors added up before they are multiplied, with the square roots of ``parts``' coefficients."""

    parts: Sequence[tuple[LowRank, float]]

    def up(self, expert: int, start: int, stop: int) -> "torch.Tensor":
        return sum_of([part.up(expert, start, stop).double() * math.sqrt(abs(c)) for part, c in self.parts])

    def down(self, expert: int) -> "torch.Tensor":
        return sum_of([part.down(expert).double() * math.copysign(math.sqrt(abs(c)), c) for part, c in self.parts])


def sum_of(tensors: Sequence["torch.Tensor"]) -> "torch.Tensor":
    first, *rest = tensors
    return sum(rest, first)


def updates_of(adapters: AdapterSet) -> Iterator[Update]:
    """Yield the updates of each adapter, in the order in which they are added."""
    for member in adapters.members:
        for factors in member.adapter.tensors.factors.values():
            yield _update(member, factors)


def combined(updates: Sequence[Update], combination: Combination) -> Sequence[Update]:
    """Return the updates of one parameter as they are added to it.

    Raises:
        AdapterRefused: Factors of different ranks are to be added before they are multiplied.
    """
    return updates if combination == "cat" or len(updates) == 1 else [_added(updates)]


def _update(member: Member, factors: Factors) -> Update:
    adapter = member.adapter
    return Update(
        member=member,
        factors=factors,
        low_rank=SavedFactors(adapter, factors),
        scaling=member.weight * adapter.scaling(factors),
        experts=adapter.experts(factors),
        shape=adapter.update_shape(factors),
        uses=tuple((adapter, name) for name in factors.names),
    )


def _added(updates: Sequence[Update]) -> Update:
    first = updates[0]
    if different := _differences(updates):
        raise AdapterRefused(
            f"Adapters of different shapes cannot be combined linearly: {different}.",
            remedy='Combine them with "cat", which adds the updates themselves.',
        )
    return Update(
        member=first.member,
        factors=first.factors,
        low_rank=FactorSum([(update.low_rank, update.scaling) for update in updates]),
        scaling=1.0,
        experts=first.experts,
        shape=first.shape,
        uses=tuple(use for update in updates for use in update.uses),
    )


def _differences(updates: Sequence[Update]) -> str | None:
    found: Mapping[object, str] = {
        (update.adapter.rank(update.factors), update.shape, update.experts): f"{update.adapter.root.name} has"
        f" {update.factors.down} {list(update.adapter.shape(update.factors.down))}"
        for update in updates
    }
    return "; ".join(found.values()) if len(found) > 1 else None
