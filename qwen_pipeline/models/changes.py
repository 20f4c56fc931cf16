"""The check that a fine-tune changes its base, as early as it is known: from settings, factors, or merged weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.digest_cache import DigestCache
from qwen_pipeline.checkpoint.hashing_reader import hashing_paused
from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.checkpoint.manifest import TensorDigest
from qwen_pipeline.errors import CheckFailed, CheckpointRefused
from qwen_pipeline.qwen.config import diff_configs
from qwen_pipeline.qwen.names import parse_name
from qwen_pipeline.reports import CheckReport, CheckSpec
from qwen_pipeline.transforms.lora.adapter_set import AdapterSet
from qwen_pipeline.transforms.lora.changes import ChangeMeter, is_changed, no_effect

CHANGES_BASE = CheckSpec(
    name="changes_the_base", description="The merged weights differ from the base's; a lost training leaves them equal."
)
_BOOKKEEPING = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache", "architectures")
"""Fields of a config that do not change what a model computes."""


def require_effect(adapters: AdapterSet, *, read_values: bool = True) -> None:
    """Require that adapters are not known to change nothing.

    Args:
        adapters: The adapters.
        read_values: Whether to read factors, and not only settings.

    Raises:
        CheckFailed: The scaling of every update is zero, or each has a factor of zeros.
    """
    if reason := no_effect(adapters, read_values=read_values):
        roots = ", ".join(str(adapter.root) for adapter in adapters.adapters)
        raise CheckFailed(
            f"{CHANGES_BASE.name}: {roots} would leave the base as it is: {reason}.",
            remedy="If the training ran, its checkpoint was saved wrongly: compare lora_alpha with the training's"
            " settings, and take an earlier or the trainer's own checkpoint.",
        )


def require_change(base: Checkpoint, output: Checkpoint) -> None:
    """Require that a whole model differs from its base, in weights or in what its config computes.

    Raises:
        CheckFailed: It does not.
    """
    changed = [path for path in diff_configs(base.config, output.config) if path.split(".")[-1] not in _BOOKKEEPING]
    with hashing_paused():
        if changed or is_changed(base, output):
            return
    raise CheckFailed(
        f"{CHANGES_BASE.name}: every tensor of the fine-tune has the values of the base.",
        remedy="The training saved the weights that it began with, or a merge of its LoRA failed: take the LoRA itself"
        " as the fine-tune, or another checkpoint.",
    )


def adapter_change_report(meter: ChangeMeter, output: Checkpoint) -> CheckReport:
    """Report on :data:`CHANGES_BASE` from what was measured while an output was written."""
    figures = meter.figures(output)
    return CHANGES_BASE.report(
        passed=figures.changed > 0,
        measured=figures.text,
        detail=f"{figures.changed} of the {figures.updated} tensors that the adapters update have other values than the"
        " base's."
        if figures.changed
        else "Every update is lost when the weights are rounded: it is smaller than half a step of their dtype.",
    )


def model_change_report(base: Path, fine_tune: Path, config: Mapping[str, Any]) -> CheckReport:
    """Report on :data:`CHANGES_BASE` from the digests of two directories that were hashed.

    Args:
        base: The base's directory.
        fine_tune: The whole model's directory.
        config: The base's config, by which the names of tensors are read.
    """
    before, after = (_digests(root, config) for root in (base, fine_tune))
    common = before.keys() & after.keys()
    changed = sum(before[key] != after[key] for key in common)
    is_rewritten = any(before[key].dtype != after[key].dtype for key in common)
    new = len(after) - len(common)
    return CHANGES_BASE.report(
        passed=changed + new > 0,
        severity="WARN",
        measured=f"{changed + new} of {len(after)} tensors",
        detail="Only the config differs from the base's."
        if not changed + new
        else f"Compared by digests: {changed} of {len(common)} tensors of the base differ"
        + (", some only by their dtype" if is_rewritten else "")
        + (f", and {new} are stored in another form." if new else "."),
    )


def _digests(root: Path, config: Mapping[str, Any]) -> dict[object, TensorDigest]:
    hashed = DigestCache().find(root)
    assert hashed, f"{root} was not hashed"
    return {_meaning(name, config): tensor.digest for name, tensor in hashed.tensors.items()}


def _meaning(name: str, config: Mapping[str, Any]) -> object:
    try:
        return parse_name(name, config)
    except CheckpointRefused:
        return name
