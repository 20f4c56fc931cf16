"""The low-rank updates of a set of adapters, each of one parameter of the model in memory."""

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

AdapterTensor = tuple[Adapter, str]
"""An adapter, and the name of one of its tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """The update of one parameter in memory: ``scaling * up @ down`` is added to each of its matrices.

    Attributes:
        experts: Number of matrices.
        shape: Shape of one matrix.
        adapter_tensors: The tensors that the update is computed from.
    """

    member: Member
    factors: Factors
    low_rank: LowRank
    scaling: float
    experts: int
    shape: tuple[int, ...]
    adapter_tensors: tuple[AdapterTensor, ...]

    @property
    def adapter(self) -> Adapter:
        return self.member.adapter


@dataclass(frozen=True, slots=True)
class FactorSum(LowRank):
    """Factors summed before they are multiplied, each weighted with the square root of its coefficient in ``parts``."""

    parts: Sequence[tuple[LowRank, float]]

    def up(self, expert: int, start: int, stop: int) -> "torch.Tensor":
        return sum_of([part.up(expert, start, stop).double() * math.sqrt(abs(c)) for part, c in self.parts])

    def down(self, expert: int) -> "torch.Tensor":
        return sum_of([part.down(expert).double() * math.copysign(math.sqrt(abs(c)), c) for part, c in self.parts])


def sum_of(tensors: Sequence["torch.Tensor"]) -> "torch.Tensor":
    first, *rest = tensors
    return sum(rest, first)


def updates_of(adapters: AdapterSet) -> Iterator[Update]:
    """Yield the updates of all adapters, in the order in which they are added."""
    for member in adapters.members:
        for factors in member.adapter.tensors.factors.values():
            yield _update(member, factors)


def combined(updates: Sequence[Update], combination: Combination) -> Sequence[Update]:
    """Return the updates to add to one parameter: all of them, or their linear combination.

    Raises:
        AdapterRefused: The combination is linear, but the factors differ in rank or shape.
    """
    return updates if combination == "cat" or len(updates) == 1 else [_linear_combination(updates)]


def _update(member: Member, factors: Factors) -> Update:
    adapter = member.adapter
    return Update(
        member=member,
        factors=factors,
        low_rank=SavedFactors(adapter, factors),
        scaling=member.weight * adapter.scaling(factors),
        experts=adapter.experts(factors),
        shape=adapter.update_shape(factors),
        adapter_tensors=tuple((adapter, name) for name in factors.names),
    )


def _linear_combination(updates: Sequence[Update]) -> Update:
    first = updates[0]
    if different := _differences(updates):
        raise AdapterRefused(
            f"Adapters of different shapes cannot be combined linearly: {different}.",
            remedy='Use the combination "cat", which adds the products of the factors instead of the factors.',
        )
    return Update(
        member=first.member,
        factors=first.factors,
        low_rank=FactorSum([(update.low_rank, update.scaling) for update in updates]),
        scaling=1.0,
        experts=first.experts,
        shape=first.shape,
        adapter_tensors=tuple(used for update in updates for used in update.adapter_tensors),
    )


def _differences(updates: Sequence[Update]) -> str | None:
    """Return one update of each rank and shape, for a message; None if all agree."""
    found: Mapping[object, str] = {
        (update.adapter.rank(update.factors), update.shape, update.experts): f"{update.adapter.root.name} has"
        f" {update.factors.down} {list(update.adapter.shape(update.factors.down))}"
        for update in updates
    }
    return "; ".join(found.values()) if len(found) > 1 else None
