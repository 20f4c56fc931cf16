"""base + fine-tune -> merged: one full-precision checkpoint, whether the fine-tune is an adapter or a whole model."""

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.digest import checkpoint_digest
from qwen_pipeline.checkpoint.lazy import INDEX, SINGLE_SHARD, Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.rewrite import Rewrite
from qwen_pipeline.checkpoint.source import open_source
from qwen_pipeline.checkpoint.store import Artifact, Destination
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.reports import CheckReport, CheckSpec, dump_reports
from qwen_pipeline.transforms.adapter import Adapter, is_adapter, open_adapter
from qwen_pipeline.transforms.fine_tune import adopt, usage_files
from qwen_pipeline.transforms.lora import merge_lora, require_targets

STAGE = "merged"
CODE_VERSION = "2"
CHECKS = (
    CheckSpec(name="every_tensor_is_used", description="Each tensor of the fine-tune lands on one tensor of the base."),
    CheckSpec(name="base_is_the_one_trained_on", description="The adapter names the base that it was merged into."),
    CheckSpec(name="weights_are_finite", description="No merged weight is NaN or infinite."),
)


def merge(
    *,
    base: Path,
    fine_tune: Path,
    destination: Destination,
    base_names: Collection[str] = (),
    hard_links: bool = False,
    observe: Observe = unobserved,
) -> Artifact:
    """Merge a fine-tune into its base.

    Args:
        base: A full-precision model directory.
        fine_tune: A directory with a PEFT LoRA, or a whole fine-tuned model, whose tensors are then the result.
        destination: Where the merged checkpoint goes.
        base_names: Every name the base is known under. If given, an adapter that names another base fails a check;
            if not, the directory's name is compared, and a difference is only a warning.
        hard_links: Whether a shard that the fine-tune does not touch may be the base's own file, by a second name.
        observe: Called with the progress.

    Raises:
        InputRefused: The fine-tune does not fit the base exactly, or one of them is quantized.
        CheckFailed: A merged weight is not finite.
    """
    read_now = destination.may_hold(STAGE)
    work = prepare(base=base, fine_tune=fine_tune, base_names=base_names, read_now=read_now, observe=observe)
    return work.write(destination, task="merge", hard_links=hard_links, observe=observe)


def prepare(
    *, base: Path, fine_tune: Path, base_names: Collection[str], read_now: bool, observe: Observe = unobserved
) -> Rewrite:
    """Check a merge and say what it is derived from and what it writes; see :func:`merge`."""
    sources = {"base": open_source("base", base, read_now=read_now, observe=observe)}
    parent, child = sources["base"].checkpoint, open_fine_tune(fine_tune)
    others: dict[str, str] = {}
    if isinstance(child, Adapter):
        merged, others["fine_tune"] = merge_lora(parent, child), child.digest()
    else:
        sources["fine_tune"] = open_source("fine_tune", fine_tune, read_now=read_now, observe=observe)
        child = sources["fine_tune"].checkpoint
        merged = adopt(parent, child)
    merged = merged.replace(sidecars=usage_files(parent.sidecars, child.sidecars))
    reports = [_use_report(parent, child), _base_report(base, child, base_names), _finite_report(merged)]
    return Rewrite(
        stage=STAGE,
        code_version=CODE_VERSION,
        spec={"base_names": sorted(base_names)},
        sources=sources,
        others=others,
        output=merged,
        result={**_summary(parent, child), "checks": dump_reports(reports)},
        if_not_finite="If the base is finite, the training diverged: use an earlier checkpoint of the fine-tune.",
    )


def open_fine_tune(root: Path) -> Adapter | Checkpoint:
    """Open an adapter or a whole model, whichever the directory holds.

    Raises:
        InputRefused: It holds neither in a form that can be merged.
    """
    if not is_adapter(root):
        return open_checkpoint(root)
    if (root / SINGLE_SHARD).exists() or (root / INDEX).exists():
        raise InputRefused(
            f"{root} holds an adapter and a whole model; it does not say which one is the fine-tune.",
            remedy="Put only one of them into the directory.",
        )
    return open_adapter(root)


def fine_tune_digest(root: Path, *, observe: Observe = unobserved) -> str:
    """Return the content digest of an adapter or of a whole model."""
    return open_adapter(root).digest() if is_adapter(root) else checkpoint_digest(root, observe=observe)


def _summary(parent: Checkpoint, child: Adapter | Checkpoint) -> dict[str, Any]:
    """Return what was merged: for an adapter its settings and the scaling of each changed tensor."""
    if not isinstance(child, Adapter):
        return {"kind": "full", "tensors": len(child)}
    scalings = {target: child.settings.scaling(module) for module, target in require_targets(parent, child).items()}
    return {
        "kind": "adapter",
        "adapter": asdict(child.settings) | {"base": child.base_name, "peft_version": child.config.get("peft_version")},
        "scalings": scalings,
    }


def _use_report(parent: Checkpoint, child: Adapter | Checkpoint) -> CheckReport:
    if isinstance(child, Adapter):
        count, where = len(child.weights.specs), f"{len(child.modules)} tensors of the base"
    else:
        count, where = len(child), f"the {len(parent)} tensors of the base, by name and shape"
    return CheckReport(
        name=CHECKS[0].name,
        passed=True,
        measured=f"{count} of {count}",
        detail=f"All {count} tensors of the fine-tune were matched to {where}, before anything was written.",
    )


def _base_report(base: Path, child: Adapter | Checkpoint, base_names: Collection[str]) -> CheckReport:
    name = CHECKS[1].name
    if not isinstance(child, Adapter):
        return CheckReport(name=name, passed=True, detail="A whole model, with exactly the base's tensors and shapes.")
    declared, known = child.base_name or "", sorted(base_names) or [base.name]
    passed = declared in known or (bool(declared) and Path(declared).resolve() == base.resolve())
    if not base_names:
        passed = passed or Path(declared).name == base.name
    return CheckReport(
        name=name,
        passed=passed,
        severity="ERROR" if base_names else "WARN",
        measured=declared or "not named",
        limit=", ".join(known),
        detail="The adapter names this base."
        if passed
        else "The adapter names another base: make sure that it was trained on this one, and register the name.",
    )


def _finite_report(merged: Checkpoint) -> CheckReport:
    return CheckReport(
        name=CHECKS[2].name,
        passed=True,
        measured=f"{len(merged)} of {len(merged)}",
        detail="Every block was tested as it passed; a NaN or an infinity would have ended the stage.",
    )
