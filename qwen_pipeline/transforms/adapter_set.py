"""One adapter, or several that are merged together with weights, as PEFT's ``add_weighted_adapter`` combines them.

``cat`` adds the updates: ``sum(w * scaling * B @ A)``. ``linear`` adds the factors before it multiplies them, each with the
square root of its weight and scaling: a cheap approximation for adapters of one rank, and here the same to the letter.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from qwen_pipeline.checkpoint.digest import directory_digest
from qwen_pipeline.errors import AdapterRefused, listed
from qwen_pipeline.qwen.geometry import PadPlan
from qwen_pipeline.transforms.adapter import Adapter, open_adapter

ADAPTER_SET = "adapters.toml"
Combination = Literal["cat", "linear"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """An adapter and its share.

    Attributes:
        padding: How the base that it was trained on was padded; None if it was not.
    """

    adapter: Adapter
    weight: float = 1.0
    padding: PadPlan | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSet:
    """Adapters in the order in which they are added up."""

    members: tuple[Member, ...]
    combination: Combination = "cat"

    @property
    def sidecars(self) -> dict[str, Path]:
        """The files beside the weights: the last adapter's that has one of a name."""
        return {path: file for member in self.members for path, file in member.adapter.sidecars.items()}

    @property
    def spec(self) -> dict[str, Any]:
        """What of this is not in the adapters' files, as JSON values."""
        return {"weights": [member.weight for member in self.members], "combination": self.combination}

    def digest(self) -> str:
        """Return ``sha256:<hex>`` over every adapter's files; of a single one, its own."""
        if len(self.members) == 1:
            return self.members[0].adapter.digest()
        files = {
            f"{number}/{relative}": file
            for number, member in enumerate(self.members)
            for relative, file in member.adapter.files().items()
        }
        return directory_digest(files)


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    path: str
    weight: FiniteFloat = 1.0


class _SetFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    adapters: list[_Entry] = Field(min_length=1)
    combination_type: Combination = "cat"


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
    members = tuple(Member(adapter=open_adapter(root / e.path), weight=e.weight) for e in named.adapters)
    return require_combinable(AdapterSet(members=members, combination=named.combination_type))


def require_combinable(adapters: AdapterSet) -> AdapterSet:
    """Return the set if its adapters can be added up with these weights.

    Raises:
        AdapterRefused: An adapter holds more than low-rank factors, whose weighted sum would mean nothing.
    """
    if len(adapters.members) == 1 and adapters.members[0].weight == 1:
        return adapters
    for adapter in (member.adapter for member in adapters.members):
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
