"""One adapter, or several that are merged together with weights, as PEFT's ``add_weighted_adapter`` combines them.

``cat`` adds the updates: ``sum(w * scaling * B @ A)``. ``linear`` adds the factors before it multiplies them, each with
the square root of its weight and scaling: an approximation, which PEFT has because its result is again of one rank.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from qwen_pipeline.checkpoint.manifest import canonical_sha256
from qwen_pipeline.errors import AdapterRefused, InputRefused, listed
from qwen_pipeline.transforms.lora.adapter import Adapter, open_adapter

ADAPTER_SET = "adapters.toml"
Combination = Literal["cat", "linear"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """An adapter and its share."""

    adapter: Adapter
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSet:
    """Adapters in the order in which they are added up."""

    members: tuple[Member, ...]
    combination: Combination = "cat"

    @property
    def adapters(self) -> list[Adapter]:
        return [member.adapter for member in self.members]

    @property
    def sidecars(self) -> dict[str, Path]:
        """The files beside the weights: the last adapter's that has one of a name."""
        return {path: file for adapter in self.adapters for path, file in adapter.sidecars.items()}

    def digest(self) -> str:
        """Return ``sha256:<hex>`` over every adapter's files and the weights; of a single plain one, its own."""
        if len(self.members) == 1 and self.members[0].weight == 1:
            return self.adapters[0].digest()
        members = [[member.adapter.digest(), member.weight] for member in self.members]
        return "sha256:" + canonical_sha256({"members": members, "combination": self.combination})


def single(adapter: Adapter) -> AdapterSet:
    """Return one adapter as a set."""
    return AdapterSet(members=(Member(adapter=adapter),))


def weighted(roots: Sequence[Path], weights: Sequence[float], *, combination: Combination) -> AdapterSet:
    """Open adapters that are merged together; without weights each counts fully.

    Raises:
        InputRefused: There are not as many weights as adapters.
        AdapterRefused: An adapter is refused, or cannot be added to others.
    """
    if weights and len(weights) != len(roots):
        raise InputRefused(
            f"{len(roots)} adapters have {len(weights)} weights.", remedy="Give each adapter a weight, or none of them."
        )
    shares = weights or [1.0] * len(roots)
    members = [Member(adapter=open_adapter(root), weight=share) for root, share in zip(roots, shares, strict=True)]
    return require_combinable(AdapterSet(members=tuple(members), combination=combination))


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    path: str
    weight: FiniteFloat = 1.0


class _SetFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    adapters: list[_Entry] = Field(min_length=1)
    combination_type: Combination = "cat"


def is_adapter_set(root: Path) -> bool:
    return (root / ADAPTER_SET).is_file()


def open_set(root: Path) -> AdapterSet:
    """Open a directory whose ``adapters.toml`` names adapters in directories below it, and their weights.

    Raises:
        AdapterRefused: The file is damaged or names a place outside, or an adapter is refused.
    """
    file = root / ADAPTER_SET
    try:
        named = _SetFile.model_validate(tomllib.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise AdapterRefused(
            f"{file} cannot be read: {error}.",
            remedy='Write combination_type = "cat", and for each adapter [[adapters]] with path and weight.',
        ) from error
    if outside := [entry.path for entry in named.adapters if not _is_below(root, entry.path)]:
        raise AdapterRefused(
            f"{file} names {listed(outside)}, which is not a directory below it.",
            remedy="Put each adapter into a directory of its own beside the file.",
        )
    roots, weights = [root / entry.path for entry in named.adapters], [entry.weight for entry in named.adapters]
    return weighted(roots, weights, combination=named.combination_type)


def require_combinable(adapters: AdapterSet) -> AdapterSet:
    """Return the set if its adapters can be added up with these weights.

    Raises:
        AdapterRefused: An adapter holds more than low-rank factors, whose weighted sum would mean nothing.
    """
    if len(adapters.members) == 1 and adapters.members[0].weight == 1:
        return adapters
    for adapter in adapters.adapters:
        if found := _more_than_factors(adapter):
            raise AdapterRefused(
                f"{adapter.root} cannot be weighted or added to others: it has {listed(list(found.values()))}.",
                remedy="Merge it by itself, and merge the others into the result.",
            )
    return adapters


def _is_below(root: Path, path: str) -> bool:
    place = (root / path).resolve()
    return place.is_relative_to(root.resolve()) and place != root.resolve() and place.is_dir()


def _more_than_factors(adapter: Adapter) -> Mapping[str, str]:
    tensors, settings = adapter.tensors, adapter.settings
    present = {
        "dora": ("DoRA's norms (use_dora)", settings.use_dora),
        "bias": ("biases of its factors (lora_bias)", settings.lora_bias),
        "saved": (f"whole weights ({listed(list(tensors.saved.values()), limit=2)})", bool(tensors.saved)),
        "tokens": ("trained tokens (trainable_token_indices)", bool(tensors.tokens)),
    }
    return {name: text for name, (text, is_there) in present.items() if is_there}
