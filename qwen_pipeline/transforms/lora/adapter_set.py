"""One adapter, or a weighted combination of several, as PEFT's ``add_weighted_adapter`` combines them.

``cat`` sums the updates: ``sum(w * scaling * B @ A)``. ``linear`` sums the factors before they are multiplied, each
with the square root of its weight times scaling: an approximation that keeps the rank, which is why PEFT offers it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from qwen_pipeline.checkpoint.files import load_toml
from qwen_pipeline.checkpoint.store.canonical import canonical_sha256
from qwen_pipeline.errors import AdapterRefused, InputRefused, listed
from qwen_pipeline.transforms.lora.adapter import Adapter, open_adapter

ADAPTER_SET = "adapters.toml"
Combination = Literal["cat", "linear"]
MAX_WEIGHT = 1e6
_MAX_PATH = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """An adapter and its weight in the sum."""

    adapter: Adapter
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSet:
    """Adapters in the order in which they are added."""

    members: tuple[Member, ...]
    combination: Combination = "cat"

    @property
    def adapters(self) -> list[Adapter]:
        return [member.adapter for member in self.members]

    @property
    def sidecars(self) -> dict[str, Path]:
        """The files other than weights; of those with the same name, that of the last adapter."""
        return {path: file for adapter in self.adapters for path, file in adapter.sidecars.items()}

    def digest(self) -> str:
        """Return ``sha256:<hex>`` over all adapters and weights; for one adapter of weight 1, its own digest."""
        if len(self.members) == 1 and self.members[0].weight == 1:
            return self.adapters[0].digest()
        members = [[member.adapter.digest(), member.weight] for member in self.members]
        return "sha256:" + canonical_sha256({"members": members, "combination": self.combination})


def single(adapter: Adapter) -> AdapterSet:
    """Return one adapter as a set."""
    return AdapterSet(members=(Member(adapter=adapter),))


def weighted(roots: Sequence[Path], weights: Sequence[float], *, combination: Combination) -> AdapterSet:
    """Open several adapters as a set; without weights each has weight 1.

    Raises:
        InputRefused: The numbers of weights and adapters differ, or a weight is not a finite number of a usual size.
        AdapterRefused: An adapter is refused, or cannot be added to others.
    """
    if weights and len(weights) != len(roots):
        raise InputRefused(
            f"Expected one weight for each of {len(roots)} adapters, got {len(weights)}.",
            remedy="Give one weight for each adapter, or no weights.",
        )
    if not all(abs(weight) <= MAX_WEIGHT for weight in weights):
        raise InputRefused(
            f"The weights {listed([f'{weight:g}' for weight in weights])} are not all finite and up to {MAX_WEIGHT:g}.",
            remedy="Give each adapter a number as its weight, such as 0.7.",
        )
    factors = weights or [1.0] * len(roots)
    members = [Member(adapter=open_adapter(root), weight=weight) for root, weight in zip(roots, factors, strict=True)]
    return require_combinable(AdapterSet(members=tuple(members), combination=combination))


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    path: Annotated[str, Field(min_length=1, max_length=_MAX_PATH, pattern=r"^[^\x00-\x1f]+$")]
    weight: Annotated[float, Field(strict=True, ge=-MAX_WEIGHT, le=MAX_WEIGHT)] = 1.0


class _SetFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    adapters: list[_Entry] = Field(min_length=1)
    combination_type: Combination = "cat"


def is_adapter_set(root: Path) -> bool:
    return (root / ADAPTER_SET).is_file()


def open_set(root: Path) -> AdapterSet:
    """Open a directory whose ``adapters.toml`` lists adapters in subdirectories, with their weights.

    Raises:
        AdapterRefused: The file is invalid or lists a directory outside, or an adapter is refused.
    """
    file = root / ADAPTER_SET
    try:
        parsed = _SetFile.model_validate(load_toml(file, refused=AdapterRefused))
    except ValueError as error:
        raise AdapterRefused(
            f"{file} is invalid: {error}.",
            remedy='Write combination_type = "cat", and one [[adapters]] table with path and weight for each adapter.',
        ) from error
    if outside := [entry.path for entry in parsed.adapters if not _is_subdirectory(root, entry.path)]:
        raise AdapterRefused(
            f"{file} lists {listed(outside)}; expected a subdirectory of {root}.",
            remedy=f"Put each adapter into a directory of its own next to {ADAPTER_SET}.",
        )
    roots, weights = [root / entry.path for entry in parsed.adapters], [entry.weight for entry in parsed.adapters]
    return weighted(roots, weights, combination=parsed.combination_type)


def require_combinable(adapters: AdapterSet) -> AdapterSet:
    """Return the set if its adapters can be summed with these weights.

    Raises:
        AdapterRefused: An adapter holds more than low-rank factors, for which no weighted sum is defined.
    """
    if len(adapters.members) == 1 and adapters.members[0].weight == 1:
        return adapters
    for adapter in adapters.adapters:
        if parts := _other_parts(adapter):
            raise AdapterRefused(
                f"{adapter.root} cannot be weighted or added to others, because it has {listed(parts)}.",
                remedy="Merge this adapter alone, then merge the others into the result.",
            )
    return adapters


def _is_subdirectory(root: Path, path: str) -> bool:
    directory = (root / path).resolve()
    return directory.is_relative_to(root.resolve()) and directory != root.resolve() and directory.is_dir()


def _other_parts(adapter: Adapter) -> list[str]:
    """Return the parts of an adapter other than low-rank factors."""
    tensors, settings = adapter.tensors, adapter.settings
    is_present = {
        "DoRA norms (use_dora)": settings.use_dora,
        "biases of its factors (lora_bias)": settings.lora_bias,
        f"whole weights ({listed(list(tensors.saved.values()), limit=2)})": bool(tensors.saved),
        "trained tokens (trainable_token_indices)": bool(tensors.tokens),
    }
    return [part for part, present in is_present.items() if present]
