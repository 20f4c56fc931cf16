"""base + fine-tune -> merged: one full-precision checkpoint, whether the fine-tune is an adapter or a whole model."""

import re
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.digest_cache import DigestCache
from qwen_pipeline.checkpoint.lazy import CONFIG, Checkpoint
from qwen_pipeline.checkpoint.store.destinations import Artifact, Destination
from qwen_pipeline.checkpoint.store.rewrite import Rewrite
from qwen_pipeline.checkpoint.store.stage_input import open_input
from qwen_pipeline.models.open import materialize, open_fine_tune, paddings_of
from qwen_pipeline.models.padded import PaddedModel, padded_model, trained_on
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.qwen.channels import sized_tensors
from qwen_pipeline.qwen.geometry import PadPlan, dump_plan
from qwen_pipeline.reports import CheckReport, CheckSpec, dump_reports
from qwen_pipeline.transforms.lora.adapter import Adapter
from qwen_pipeline.transforms.lora.adapter_set import AdapterSet
from qwen_pipeline.transforms.lora.fine_tune import adopt, usage_files
from qwen_pipeline.transforms.lora.merge import Merged, merge_lora

STAGE = "merged"
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
CODE_VERSION = "3"
CHECKS = (
    CheckSpec(name="every_tensor_is_used", description="Each tensor of the fine-tune lands on one tensor of the base."),
    CheckSpec(name="base_is_the_one_trained_on", description="The adapter names the base that it was merged into."),
    CheckSpec(name="weights_are_finite", description="No merged weight is NaN or infinite."),
)


def merge(
    *,
    base: Path,
    fine_tune: Path | AdapterSet,
    destination: Destination,
    base_names: Collection[str] = (),
    base_revision: str | None = None,
    padded: Path | None = None,
    hard_links: bool = False,
    observe: Observe = unobserved,
) -> Artifact:
    """Merge a fine-tune into its base.

    Args:
        base: A full-precision model directory.
        fine_tune: A directory with a PEFT LoRA, with several and a file that weights them, or with a whole fine-tuned
            model, whose tensors are then the result. Or a set of adapters.
        destination: Where the merged checkpoint goes.
        base_names: Every name the base is known under. If given, an adapter that names another base fails a check;
            if not, the directory's name is compared, and a difference is only a warning.
        base_revision: The base's commit, tag or branch. An adapter that names another one fails the same check.
        padded: The padded checkpoint that the adapter was trained on, if it does not name it itself.
        hard_links: Whether a shard that the fine-tune does not touch may be the base's own file, by a second name.
        observe: Called with the progress.

    Raises:
        InputRefused: The fine-tune does not fit the base exactly, or one of them is quantized.
        CheckFailed: A merged weight is not finite.
    """
    read_now = destination.may_hold(STAGE)
    work = prepare(
        base=base,
        fine_tune=fine_tune,
        base_names=base_names,
        base_revision=base_revision,
        padded=padded,
        read_now=read_now,
        observe=observe,
    )
    artifact = work.write(destination, task="merge", hard_links=hard_links, observe=observe)
    return materialize(artifact.path, observe=observe) if artifact.manifest.recipe else artifact


def prepare(
    *,
    base: Path,
    fine_tune: Path | AdapterSet,
    base_names: Collection[str],
    base_revision: str | None = None,
    padded: Path | None = None,
    read_now: bool,
    observe: Observe = unobserved,
) -> Rewrite:
    """Check a merge and say what it is derived from and what it writes; see :func:`merge`."""
    sources = {"base": open_input("base", base, read_now=read_now, observe=observe)}
    parent = sources["base"].checkpoint
    child = fine_tune if isinstance(fine_tune, AdapterSet) else open_fine_tune(fine_tune)
    spec: dict[str, Any] = {"base_names": sorted(base_names)}
    if isinstance(child, AdapterSet):
        merged = merge_lora(parent, child, paddings=paddings_of(base, child, padded=padded))
        spec |= {"base_revision": base_revision, **_bridge_spec(merged)}
        output, others = merged.checkpoint, {"fine_tune": child.digest()}
        summary = _adapter_summary(merged, child) | _way_back(merged, padded_model(base))
        model = trained_on(child, padded) if merged.bridge else None

        def reports() -> list[CheckReport]:
            is_padded_base = model is not None and model.live_digest == sources["base"].final_digest()
            return [
                _use_report(child, merged),
                base_report(base, child, base_names, base_revision, is_padded_base=is_padded_base),
            ]
    else:
        assert isinstance(fine_tune, Path)
        sources["fine_tune"] = open_input("fine_tune", fine_tune, read_now=read_now, observe=observe)
        child = sources["fine_tune"].checkpoint
        output, others, summary = adopt(parent, child), {}, {"kind": "full", "tensors": len(child)}

        def reports() -> list[CheckReport]:
            return _full_reports(parent, child)

    output = output.replace(sidecars=usage_files(parent.sidecars, child.sidecars))
    return Rewrite(
        stage=STAGE,
        code_version=CODE_VERSION,
        spec=spec,
        sources=sources,
        others=others,
        output=output,
        result=lambda: {**summary, "checks": dump_reports([*reports(), _finite_report(output)])},
        if_not_finite="If the base is finite, the training diverged: use an earlier checkpoint of the fine-tune.",
    )


def _bridge_spec(merged: Merged) -> dict[str, Any]:
    bridge = merged.bridge
    return {"trained": bridge.trained, "padding": dump_plan(bridge.plan)} if bridge else {}


def _way_back(merged: Merged, base: PaddedModel | None) -> dict[str, Any]:
    """Return what unpadding needs, if what was merged is padded as its base is."""
    if base is None or (merged.bridge is None and _changes_padded_tensors(merged, base.plan)):
        return {}
    config = base.live_config if merged.checkpoint.config_bytes else None
    return {"padding": dump_plan(base.plan), "live_config": config}


def _changes_padded_tensors(merged: Merged, plan: PadPlan) -> bool:
    padded = {name for size in plan.sizes for name in sized_tensors(merged.checkpoint, size.field)}
    return any(recipe.uses for name, recipe in merged.plan.recipes.items() if name in padded)


def _adapter_summary(merged: Merged, adapters: AdapterSet) -> dict[str, Any]:
    """Return what was merged: the adapters' settings, and the scalings of each changed tensor."""
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
    recipes = merged.plan.recipes.items()
    scalings = {name: sorted({term.scaling for term in recipe.terms}) for name, recipe in recipes if recipe.terms}
    return {"kind": "adapter", "adapters": described, "combination": adapters.combination, "scalings": scalings}


def _use_report(adapters: AdapterSet, merged: Merged) -> CheckReport:
    count = sum(len(adapter.weights.specs) for adapter in adapters.adapters)
    where = f"{sum(bool(recipe.uses) for recipe in merged.plan.recipes.values())} tensors of the base"
    sides = {"live": ", which was unpadded for it and padded again", "padded": ", padded as it was in training"}
    where += sides[merged.bridge.trained] if merged.bridge else ""
    return CheckReport(
        name=CHECKS[0].name,
        passed=True,
        measured=f"{count} of {count}",
        detail=f"All {count} tensors of the fine-tune were matched to {where}, before anything was written.",
    )


def _full_reports(parent: Checkpoint, child: Checkpoint) -> list[CheckReport]:
    count = len(child)
    is_resized = any(child[name].shape != spec.shape for name, spec in parent.items() if name in child)
    but = " but for the rows of its vocabulary" if is_resized else ""
    return [
        CheckReport(
            name=CHECKS[0].name,
            passed=True,
            measured=f"{count} of {count}",
            detail=f"All {count} tensors were matched to the {len(parent)} of the base, by name and shape,"
            " before anything was written.",
        ),
        CheckReport(
            name=CHECKS[1].name, passed=True, detail=f"A whole model, with the base's tensors and shapes{but}."
        ),
    ]


def base_report(
    base: Path,
    adapters: AdapterSet,
    base_names: Collection[str],
    base_revision: str | None,
    *,
    is_padded_base: bool = False,
) -> CheckReport:
    """Return whether the adapters name this base; ``is_padded_base``: or a checkpoint that it was padded to."""
    known = sorted(base_names) or [base.name]
    unnamed = [a for a in adapters.adapters if not is_padded_base and not _is_named(a, base, base_names)]
    strangers = [a for a in unnamed if not _names_what_was_padded(a, base)]
    others = [a for a in adapters.adapters if not may_be_same_revision(a.revision, base_revision)]
    passed = not strangers and not others
    declared = {(a.base_name or "not named") + (f" at {a.revision}" if a.revision else "") for a in adapters.adapters}
    return CheckReport(
        name=CHECKS[1].name,
        passed=passed,
        severity="ERROR" if base_names or others else "WARN",
        measured=", ".join(sorted(declared)),
        limit=", ".join(known) + (f" at {base_revision}" if base_revision else ""),
        detail="The adapter was trained on a checkpoint that this base was padded to."
        if is_padded_base and passed
        else "The adapter names the checkpoint that this base was padded from, says the base's manifest."
        if unnamed and passed
        else "The adapter names this base."
        if passed
        else "The adapter names another base: make sure that it was trained on this one, and register the name."
        if strangers
        else "The adapter names another revision of this base: set base_revision to the one it was trained on.",
    )


def _is_named(adapter: Adapter, base: Path, base_names: Collection[str]) -> bool:
    declared = adapter.base_name or ""
    if declared in base_names or (bool(declared) and Path(declared).resolve() == base.resolve()):
        return True
    return not base_names and Path(declared).name == base.name


def _names_what_was_padded(adapter: Adapter, base: Path) -> bool:
    """Whether a base was padded from the checkpoint that an adapter names: if it is here, and its digest known."""
    ours, named = padded_model(base), Path(adapter.base_name or "")
    if ours is None or not adapter.base_name or not (named / CONFIG).is_file():
        return False
    live = DigestCache().find(named)
    return live is not None and live.digest == ours.live_digest


def may_be_same_revision(one: str | None, other: str | None) -> bool:
    """Whether two revisions can be the same: a commit may be shortened, and may be what a branch points at."""
    if not one or not other or bool(_COMMIT.fullmatch(one)) != bool(_COMMIT.fullmatch(other)):
        return True
    return one.startswith(other) or other.startswith(one) if _COMMIT.fullmatch(one) else one == other


def _finite_report(merged: Checkpoint) -> CheckReport:
    return CheckReport(
        name=CHECKS[2].name,
        passed=True,
        measured=f"{len(merged)} of {len(merged)}",
        detail="Every block was tested as it passed; a NaN or an infinity would have ended the stage.",
    )
