"""Merges of adapters that were trained at another MLP width than the base's, where the padding map is known.

The adapters are merged at the width that they were trained at, and the result is brought to the width of the base. For
a padded base it is bit for bit the result of padding after merging. For a live base it is the live channels, provided
that the channels that padding added have no effect: then the model computes the same without them.
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
from qwen_pipeline.transforms.lora.lazy_ops import cast
from qwen_pipeline.transforms.lora.plan import MergePlan
from qwen_pipeline.transforms.padding.pad import changed_channels, narrowed, pad, unpad
from qwen_pipeline.transforms.padding.splitting import is_down_projection, mlp_module

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Paddings:
    """The known padding maps of a merge.

    Attributes:
        base: The padding of the base; None if it is not padded or not known.
        training: The padding of the model that the adapters were trained on; None likewise.
    """

    base: PadPlan | None = None
    training: PadPlan | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddingBridge:
    """The padding between the width of the base and the width that adapters were trained at.

    Attributes:
        plan: The padding plan.
        trained: The side that the adapters were trained on; the base is on the other.
    """

    plan: PadPlan
    trained: Literal["live", "padded"]

    def to_trained_width(self, base: Checkpoint) -> Checkpoint:
        """Return the base at the width that the adapters were trained at."""
        if self.trained == "live":
            return unpad(base, self.plan)
        return _with_wide_down_projections(pad(base, self.plan), self.plan)

    def to_base_width(self, base: Checkpoint, before: Checkpoint, merged: Checkpoint) -> Checkpoint:
        """Return a merged checkpoint at the base's width; tensors that no adapter changed are the base's own.

        Args:
            base: The unmodified base.
            before: The base at the width of ``merged``.
            merged: ``before`` with the adapters merged.
        """
        resized = pad(merged, self.plan) if self.trained == "live" else narrowed(merged, self.plan)
        wide = [name for name in base if resized[name].dtype != base[name].dtype]
        unchanged = {name: base.tensors[name] for name in base if _is_unchanged(before, merged, name)}
        if merged.config is before.config:
            resized = replace(resized, config=base.config, config_bytes=base.config_bytes)
        narrow = {name: cast(resized.tensors[name], base[name].dtype) for name in wide}
        return resized.replace(tensors=narrow | unchanged)

    def require_added_channels_unused(self, plan: MergePlan) -> None:
        """Require that the channels that padding added, which a live base does not have, have no effect.

        A channel contributes ``down * silu(gate) * up``, which is zero if its gate or its up row is zero, regardless
        of its down column. Training keeps both rows zero, because their gradients are zero. All parts of a split
        channel must still have the same gate and up rows, so that their down columns can be summed.

        Raises:
            AdapterRefused: An added channel has an effect; the message names the tensors.
        """
        if self.trained == "live":
            return
        changed = plan.base.replace(tensors=plan.changed_tensors())
        if used := [name for size in self.plan.sizes for name in _used_added_channels(size, plan.base, changed)]:
            raise AdapterRefused(
                f"The adapter uses channels that padding added, which this base does not have, in {listed(used)}.",
                remedy="Merge it into the padded checkpoint that it was trained on, and quantize the result.",
            )


def padding_bridge(base: Checkpoint, adapters: AdapterSet, paddings: Paddings) -> PaddingBridge | None:
    """Return the padding between the base and the model that the adapters were trained on; None if the widths agree."""
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
    """Yield the size fields that an adapter's tensors have channels of, each with the number of channels."""
    for parameter, shape in _shapes(adapter):
        try:
            channels = channels_of(parse_name(parameter, base.config), shape, base.config)
        except CheckpointRefused:
            continue
        if channels and channels.axis < len(shape):
            yield channels.field, shape[channels.axis] // channels.halves


def _shapes(adapter: Adapter) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the parameters that an adapter changes, each with its shape in the model that it was trained on."""
    for parameter, factors in adapter.tensors.factors.items():
        shape = adapter.update_shape(factors)
        yield parameter, (adapter.experts(factors), *shape) if factors.layout.endswith("experts") else shape
    for parameter, name in adapter.tensors.saved.items():
        yield parameter, adapter.shape(name)


def _is_unchanged(before: Checkpoint, after: Checkpoint, name: str) -> bool:
    return name in before and after.tensors[name] is before.tensors[name]


def _with_wide_down_projections(padded: Checkpoint, plan: PadPlan) -> Checkpoint:
    """Return a padded checkpoint in which the parts of split channels are not rounded before they are summed."""
    wide: dict[str, LazyTensor] = {}
    for size in plan.sizes:
        for name in sized_tensors(padded, size.field) if size.layout == "split" and size.zeros else ():
            if is_down_projection(name):
                is_half = padded[name].torch_dtype.itemsize <= 2
                wide[name] = cast(padded.tensors[name], "F32" if is_half else "F64")
    return padded.replace(tensors=wide)


def _used_added_channels(size: PaddedSize, before: Checkpoint, after: Checkpoint) -> Iterator[str]:
    """Yield the gate and up projections in which an adapter gave an added channel an effect."""
    changed: dict[str, dict[str, Channels]] = defaultdict(dict)
    for name, channels in sized_tensors(after, size.field).items() if size.zeros else ():
        if not is_down_projection(name) and not _is_unchanged(before, after, name):
            changed[mlp_module(name)][name] = channels
    for projections in changed.values():
        gate, up = _changes(size, after, projections)
        has_effect = gate | up if size.layout == "split" else gate & up
        if has_effect.any():
            yield from sorted(projections)


def _changes(
    size: PaddedSize, after: Checkpoint, projections: Mapping[str, Channels]
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Return the channels of gate and of up that differ from what padding made: bool [P], or [E, P] of a stack.

    The ``fc1`` of a tower without gates counts as both: its channels have no effect only if they are zero.
    """
    import torch

    none = torch.zeros(size.padded, dtype=torch.bool)
    gate, up = none, none
    for name, channels in projections.items():
        changed = changed_channels(name, after.tensors[name], channels, size)
        of_gate, of_up = changed if channels.halves == 2 else (changed[0], changed[0])
        gate = gate if ".up_proj." in name else gate | of_gate
        up = up if ".gate_proj." in name else up | of_up
    return gate, up
