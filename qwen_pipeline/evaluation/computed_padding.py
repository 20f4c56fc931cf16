"""The padded model, computed from the merged one where its layers already are, instead of being read as well."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.checkpoint.manifest import find_manifest
from qwen_pipeline.models.padded import padded_model
from qwen_pipeline.qwen.geometry import PadPlan
from qwen_pipeline.transforms.padding.pad import pad


class ComputedPadding:
    """A padded checkpoint whose tensors are computed from those of the merged one, by the maps in its manifest.

    Args:
        merged: The merged checkpoint.
        padded: The padded one as it is stored.
        plan: The padding plan.

    Attributes:
        checkpoint: The padded checkpoint.
    """

    def __init__(self, merged: Checkpoint, padded: Checkpoint, plan: PadPlan) -> None:
        self._merged = merged
        self._held: Mapping[str, Tensor] = {}
        tensors = {name: replace(each, read=partial(self._read, name)) for name, each in merged.tensors.items()}
        self.checkpoint = replace(padded, tensors=pad(merged.replace(tensors=tensors), plan).tensors)

    def compute(self, held: Mapping[str, Tensor], name: str) -> Tensor:
        """Return a tensor of the padded checkpoint, computed on the device of ``held``, tensors of the merged one."""
        self._held = held
        try:
            return self.checkpoint.load(name)
        finally:
            self._held = {}

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        held = self._held.get(name)
        return self._merged.tensors[name].read(start, stop) if held is None else held[start:stop]


def computed_padding(merged: Checkpoint, merged_root: Path, padded: Checkpoint, root: Path) -> ComputedPadding | None:
    """Return the padded checkpoint of ``root`` as computed from ``merged``; None if it was not made from that."""
    manifest, found = find_manifest(merged_root), padded_model(root)
    if not (manifest and found and found.live_digest == manifest.content_digest):
        return None
    computed = ComputedPadding(merged, padded, found.plan)
    return computed if dict(computed.checkpoint) == dict(padded) else None
