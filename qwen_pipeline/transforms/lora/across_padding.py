"""Merging across padding: adapters of another width than the base, whose padding map is known.

They are merged at the width they were trained at, and what comes out is brought to the width of the base. Into a padded
base goes what padding after merging gives, bit for bit. Into a live one go the live channels of what was trained, if
those that padding added give nothing: then the model computes the same without them.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.errors import AdapterRefused, CheckpointRefused, listed
from qwen_pipeline.qwen.channels import Channels, channels_of, sized_tensors
from qwen_pipeline.qwen.geometry import PaddedSize, PadPlan
from qwen_pipeline.qwen.layers import required
from qwen_pipeline.qwen.names import parse_name
from qwen_pipeline.transforms.lora.adapter import Adapter
from qwen_pipeline.transforms.lora.adapter_set import AdapterSet
from qwen_pipeline.transforms.lora.lazy_ops import rounded
from qwen_pipeline.transforms.lora.plan import MergePlan
from qwen_pipeline.transforms.padding.pad import changed_channels, narrowed, pad, unpad
from qwen_pipeline.transforms.padding.splitting import gives_output, owner_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Paddings:
    """What is known of padding.

    Attributes:
        base: How the base was padded, if it was.
        training: How the model that the adapters were trained on was padded, if it was.
    """

    base: PadPlan | None = None
    training: PadPlan | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddingBridge:
    """A merge at another width than the base's.

    Attributes:
        plan: The padding between the two.
        trained: Which side of it the adapters were trained on; the base is on the other.
    """

    plan: PadPlan
    trained: Literal["live", "padded"]

    def enter(self, base: Checkpoint) -> Checkpoint:
        """Return the base as the adapters know it."""
        return unpad(base, self.plan) if self.trained == "live" else _with_wide_parts(pad(base, self.plan), self.plan)

    def leave(self, base: Checkpoint, before: Checkpoint, merged: Checkpoint) -> Checkpoint:
        """Return what was merged, at the base's width; what adapters did not change is the base's own."""
        resized = pad(merged, self.plan) if self.trained == "live" else narrowed(merged, self.plan)
        wide = [name for name in base if resized[name].dtype != base[name].dtype]
        own = {name: base.tensors[name] for name in base if _is_same(before, merged, name)}
        if merged.config is before.config:
            resized = replace(resized, config=base.config, config_bytes=base.config_bytes)
        return resized.replace(tensors={name: rounded(resized.tensors[name], base[name].dtype) for name in wide} | own)

    def require_silent(self, plan: MergePlan) -> None:
        """Refuse to leave out channels that give something.

        A channel gives ``down * silu(gate) * up``: nothing if its gate or its up are zero, whatever its down column
        holds. That is how training leaves them: their gradients are zero. Parts of a live channel must have stayed
        the same in gate and up; their shares are added up.

        Raises:
            AdapterRefused: Naming the tensors.
        """
        if self.trained == "live":
            return
        changed = plan.base.replace(tensors=plan.changed())
        if loud := [name for size in self.plan.sizes for name in _loud(size, plan.base, changed)]:
            raise AdapterRefused(
                f"The adapter uses channels that padding added, which this base does not have, in {listed(loud)}.",
                remedy="Merge it into the padded checkpoint that it was trained on, and go on from there.",
            )


def padding_bridge(base: Checkpoint, adapters: AdapterSet, paddings: Paddings) -> PaddingBridge | None:
    """Return the padding that lies between the base and what the adapters were trained on; None if they fit."""
    widths = {width for adapter in adapters.adapters for width in _widths(adapter, base)}
    sides: Mapping[Literal["live", "padded"], PadPlan | None] = {"live": paddings.base, "padded": paddings.training}
    for trained, plan in sides.items():
        for size in plan.sizes if plan else ():
            ours, theirs = (size.padded, size.live) if trained == "live" else (size.live, size.padded)
            if ours != theirs and required(base.config, size.field) == ours and (size.field, theirs) in widths:
                assert plan
                return PaddingBridge(plan=plan, trained=trained)
    return None


def _widths(adapter: Adapter, base: Checkpoint) -> Iterator[tuple[str, int]]:
    """Yield the size fields that an adapter's tensors have channels of, with how many."""
    for parameter, shape in _shapes(adapter):
        try:
            at = channels_of(parse_name(parameter, base.config), shape, base.config)
        except CheckpointRefused:
            continue
        if at and at.axis < len(shape):
            yield at.field, shape[at.axis] // at.halves


def _shapes(adapter: Adapter) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the parameters that an adapter changes, with the shape that they have where it was trained."""
    for parameter, factors in adapter.tensors.factors.items():
        shape = adapter.update_shape(factors)
        yield parameter, (adapter.experts(factors), *shape) if factors.layout == "experts" else shape
    for parameter, name in adapter.tensors.saved.items():
        yield parameter, adapter.shape(name)


def _is_same(before: Checkpoint, after: Checkpoint, name: str) -> bool:
    return name in before and after.tensors[name] is before.tensors[name]


def _with_wide_parts(padded: Checkpoint, plan: PadPlan) -> Checkpoint:
    """Return a padded checkpoint whose shares of a channel are not rounded before they are added up."""
    wide: dict[str, LazyTensor] = {}
    for size in plan.sizes:
        for name in sized_tensors(padded, size.field) if size.layout == "split" and size.zeros else ():
            if gives_output(name):
                is_short = padded[name].torch_dtype.itemsize <= 2
                wide[name] = rounded(padded.tensors[name], "F32" if is_short else "F64")
    return padded.replace(tensors=wide)


def _loud(size: PaddedSize, before: Checkpoint, after: Checkpoint) -> Iterator[str]:
    """Yield the tensors of gates and ups in whose added channels an adapter left something that is heard."""
    owners: dict[str, dict[str, Channels]] = defaultdict(dict)
    for name, at in sized_tensors(after, size.field).items() if size.zeros else ():
        if not gives_output(name) and not _is_same(before, after, name):
            owners[owner_of(name)][name] = at
    for names in owners.values():
        gate, up = _changes(size, after, names)
        heard = gate | up if size.layout == "split" else gate & up
        if heard.any():
            yield from sorted(names)


def _changes(size: PaddedSize, after: Checkpoint, names: Mapping[str, Channels]) -> "tuple[torch.Tensor, torch.Tensor]":
    """Return which channels of gate and of up are not as padding made them: bool [P], or [E, P] of a stack.

    The ``fc1`` of a tower without gates is both: its channels are silent only as zeros.
    """
    import torch

    none = torch.zeros(size.padded, dtype=torch.bool)
    gate, up = none, none
    for name, at in names.items():
        found = changed_channels(name, after.tensors[name], at, size)
        of_gate, of_up = found if at.halves == 2 else (found[0], found[0])
        gate = gate if ".up_proj." in name else gate | of_gate
        up = up if ".gate_proj." in name else up | of_up
    return gate, up
