"""The checkpoint that a quantized one was made from, with the padding and repairs that manifests record."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.checkpoint.manifest import Derivation, Manifest, find_manifest
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.qwen.geometry import PadPlan, load_plan, plan_between, resized_config
from qwen_pipeline.transforms.codes.base_weights import BaseWeights, base_weights
from qwen_pipeline.transforms.padding.pad import pad

MERGED_STAGE, QUANTIZED_STAGE, REPAIRED = "merged", "quantized", "repaired"
"""The stage that merges, the one that computes codes, and the one that adds groups to them."""


def quantized_from(merged: Checkpoint, padded: Checkpoint | None, quantized: Checkpoint, root: Path) -> Checkpoint:
    """Return the weights that became the codes of ``quantized`` at ``root``.

    They are the weights of the padded checkpoint or, if it is not given, of the merged one with interleaved zeros as in
    Qwen's documentation, plus the groups that a repair added to the codes.
    """
    before, repaired = padded or merged, _repair_of(root)
    config = quantized.config
    group_size = config.get("quantization_config", {}).get("group_size", 1)
    for size in repaired.sizes if repaired else ():
        config = resized_config(config, size, size.live)
    source = pad(before, plan_between(before.config, config, group_size=group_size))
    return pad(source, repaired) if repaired else source


def equal_by_digest(source: Path, quantized: Path) -> list[str]:
    """Return the tensors that are equal in a model and in what was quantized from it, by the digests in both manifests.

    The files of ``quantized`` must have been compared with its manifest.
    """
    before, after = find_manifest(source), find_manifest(quantized)
    if not (before and after):
        return []
    digests = before.contents.tensors
    return [name for name, digest in after.contents.tensors.items() if digests.get(name) == digest]


def widened(merged: Mapping[str, Any], quantized: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each size field that padding changed, as JSON values."""
    sizes = plan_between(merged, quantized, group_size=1).sizes
    return [{"field": size.field, "live": size.live, "padded": size.padded} for size in sizes if size.zeros]


def require_padded(merged: Checkpoint, padded: Checkpoint | None, quantized: Checkpoint, root: Path) -> None:
    """Require the padded checkpoint if the pipeline made one: only its manifest records the positions of new channels.

    Raises:
        InputRefused: The candidate was quantized from a padded checkpoint that is not given.
    """
    manifest = find_manifest(root)
    is_ours = manifest is not None and manifest.derivation.stage == QUANTIZED_STAGE
    if is_ours and not padded and widened(merged.config, quantized.config):
        raise InputRefused(
            f"{root} was quantized from a padded checkpoint, whose manifest records the positions of the new channels.",
            remedy="Pass the padded checkpoint: --padded DIR",
        )


def require_unpadded_baseline(
    unpadded: Checkpoint, merged: Checkpoint, quantized: Checkpoint, *, root: Path, merged_digest: str, candidate: Path
) -> None:
    """Require that ``unpadded`` at ``root`` differs from ``quantized`` by padding only.

    Raises:
        InputRefused: The checkpoint has other sizes than the merged model, was quantized from another model or on other
            tokens, or has another code format.
    """
    own, other = (find_manifest(each) for each in (root, candidate))
    faults = {
        "is padded": widened(merged.config, unpadded.config),
        "has another code format than the candidate": _codes(unpadded) != _codes(quantized),
        "was quantized from another model": own and own.derivation.inputs.get("source") != merged_digest,
        "was quantized on other tokens": own and other and calibration_digest(own) != calibration_digest(other),
    }
    if found := [fault for fault, holds in faults.items() if holds]:
        raise InputRefused(
            f"{root} {', '.join(found)}, so it cannot show the cost of padding.",
            remedy="Quantize the merged checkpoint with the same settings and calibration as the padded one.",
        )


def require_other_merge(other: Path, reference: Path) -> None:
    """Require that two merges have the same inputs, and differ in the way in which the base was read.

    Raises:
        InputRefused: A directory was not merged by this pipeline, or another base or fine-tune was merged.
    """
    merges = [manifest.derivation if (manifest := find_manifest(root)) else None for root in (other, reference)]
    own, theirs = (merge if merge and merge.stage == MERGED_STAGE else None for merge in merges)
    if not own or not theirs or own.inputs != theirs.inputs or _reading(own) == _reading(theirs):
        raise InputRefused(
            f"{other} is not the merge of {reference}'s base and fine-tune onto the base read in another way.",
            remedy="Merge both with qwen-pipeline merge, one of them with --base-nf4, or leave out --other-merge.",
        )


def reading_of_base(root: Path) -> str:
    """Return the settings with which a merge read its base, in words."""
    manifest = find_manifest(root)
    assert manifest
    weights = _reading(manifest.derivation)
    rounding = f"rounded to NF4 as by QLoRA (base_nf4 {weights.nf4})" if weights.nf4 else ""
    codes = "decoded from its codes (base_dequantize)" if weights.dequantize else ""
    return " and ".join(filter(None, (codes, rounding))) or "as it is stored"


def _reading(merge: Derivation) -> BaseWeights:
    return replace(base_weights(merge.spec), text_only=False)


def calibration_digest(quantized: Manifest) -> str | None:
    """Return the digest of the calibration tokens in a quantized checkpoint's manifest, if it has one."""
    return quantized.derivation.inputs.get("calibration")


def _codes(checkpoint: Checkpoint) -> list[Any]:
    settings = checkpoint.config.get("quantization_config", {})
    return [settings.get(name) for name in ("bits", "group_size", "sym", "desc_act")]


def _repair_of(root: Path) -> PadPlan | None:
    manifest = find_manifest(root)
    if manifest is None or manifest.derivation.stage != REPAIRED:
        return None
    return load_plan(manifest.result["padding"])
