"""The part of a merge's result that describes adapters, and the sentence of its check about their tensors."""

from dataclasses import asdict
from typing import Any

from qwen_pipeline.transforms.lora.adapter_set import AdapterSet
from qwen_pipeline.transforms.lora.merge import Merged


def adapter_summary(merged: Merged, adapters: AdapterSet) -> dict[str, Any]:
    """Return the manifest's description of merged adapters: their settings, and the scalings of each changed tensor."""
    described = [
        asdict(member.adapter.settings)
        | {
            "weight": member.weight,
            "base": member.adapter.base_name,
            "revision": member.adapter.revision,
            "peft_version": member.adapter.config.get("peft_version"),
        }
        for member in adapters.members
    ]
    changes = merged.plan.merges.items()
    scalings = {name: sorted({term.scaling for term in change.terms}) for name, change in changes if change.terms}
    return {"kind": "adapter", "adapters": described, "combination": adapters.combination, "scalings": scalings}


def used_detail(merged: Merged, count: int) -> str:
    """Return a sentence about the match of all ``count`` tensors of the adapters."""
    changed = sum(bool(merge.adapter_tensors) for merge in merged.plan.merges.values())
    sides = {"live": ", which was unpadded for it and padded again", "padded": ", padded as it was in training"}
    padding = sides[merged.bridge.trained] if merged.bridge else ""
    return (
        f"All {count} tensors of the fine-tune were matched to {changed} tensors of the base{padding}, before anything"
        " was written."
    )
