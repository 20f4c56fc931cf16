"""Padded checkpoints by their manifests: what was padded how, and which of them adapters were trained on."""

from dataclasses import dataclass
from pathlib import Path

from qwen_pipeline.checkpoint.manifest import find_manifest
from qwen_pipeline.errors import AdapterRefused, InputRefused
from qwen_pipeline.qwen.geometry import PadPlan, load_plan
from qwen_pipeline.transforms.lora.adapter_set import AdapterSet


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedModel:
    """A padded checkpoint in full precision.

    Attributes:
        plan: How it was padded.
        live_digest: Content digest of what was padded; None if that was never stored.
        live_config: Its ``config.json``.
    """

    root: Path
    plan: PadPlan
    live_digest: str | None
    live_config: str | None


def padded_model(root: Path) -> PaddedModel | None:
    """Return what the manifest of a directory says about padding; None if it has none, or its widths did not change."""
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


def trained_on(adapters: AdapterSet, named: Path | None = None) -> PaddedModel | None:
    """Return the padded checkpoint that adapters were trained on: the one named, or the one that they name.

    Raises:
        InputRefused: The one named has no padding map.
        AdapterRefused: Adapters name different ones.
    """
    if named:
        if found := padded_model(named):
            return found
        raise InputRefused(
            f"{named} has no padding map: it was not padded, or not by this pipeline.",
            remedy="Name the directory that the stage pad wrote, or leave --trained-on out.",
        )
    roots = {Path(name) for adapter in adapters.adapters if (name := adapter.base_name)}
    models = [model for root in sorted(roots) if (model := padded_model(root))]
    if any(model.plan != models[0].plan for model in models):
        raise AdapterRefused(
            f"The adapters were trained on differently padded models: {', '.join(str(m.root) for m in models)}.",
            remedy="Merge them one after the other.",
        )
    return models[0] if models else None
