"""Padded checkpoints and their padding maps, by manifest; the padded checkpoint that adapters were trained on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.manifest import find_manifest
from qwen_pipeline.errors import AdapterRefused, InputRefused
from qwen_pipeline.qwen.channels import sized_tensors
from qwen_pipeline.qwen.geometry import PadPlan, dump_plan, load_plan
from qwen_pipeline.transforms.lora.adapter_set import AdapterSet
from qwen_pipeline.transforms.lora.merge import Merged


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedModel:
    """A padded checkpoint in full precision.

    Attributes:
        root: Its directory.
        plan: The padding plan.
        live_digest: Content digest of the checkpoint before padding; None if it was never stored.
        live_config: The ``config.json`` before padding.
    """

    root: Path
    plan: PadPlan
    live_digest: str | None
    live_config: str | None


def padded_model(root: Path) -> PaddedModel | None:
    """Return the padding in a directory's manifest; None if there is none, or if no width changed."""
    manifest = find_manifest(root)
    if manifest is None or "live_config" not in manifest.result:
        return None
    if not (plan := load_plan(manifest.result["padding"])).changes:
        return None
    return PaddedModel(
        root=root,
        plan=plan,
        live_digest=manifest.derivation.inputs.get("source"),
        live_config=manifest.result["live_config"],
    )


def trained_on(adapters: AdapterSet, root: Path | None = None) -> PaddedModel | None:
    """Return the padded checkpoint that adapters were trained on: that in ``root``, or the one that their configs name.

    Raises:
        InputRefused: ``root`` has no padding map.
        AdapterRefused: The adapters' configs name checkpoints that were padded differently.
    """
    if root:
        if found := padded_model(root):
            return found
        raise InputRefused(
            f"{root} has no padding map: it is not padded, or was not padded by this pipeline.",
            remedy="Pass the directory that the stage pad wrote as --trained-on, or omit the option.",
        )
    roots = {Path(name) for adapter in adapters.adapters if (name := adapter.base_name)}
    models = [model for path in sorted(roots) if (model := padded_model(path))]
    if any(model.plan != models[0].plan for model in models):
        raise AdapterRefused(
            f"The adapters were trained on differently padded models: {', '.join(str(m.root) for m in models)}.",
            remedy="Merge one adapter at a time, each into the result of the merge before.",
        )
    return models[0] if models else None


def unpad_data(merged: Merged, base: PaddedModel | None) -> dict[str, Any]:
    """Return the data that unpadding needs, if the merged checkpoint is padded like its base."""
    if base is None or (merged.bridge is None and _changes_padded_tensors(merged, base.plan)):
        return {}
    config = base.live_config if merged.checkpoint.config_bytes else None
    return {"padding": dump_plan(base.plan), "live_config": config}


def _changes_padded_tensors(merged: Merged, plan: PadPlan) -> bool:
    padded = {name for size in plan.sizes for name in sized_tensors(merged.checkpoint, size.field)}
    return any(change.adapter_tensors for name, change in merged.plan.merges.items() if name in padded)
