"""merged -> padded: MLPs as wide as whole quantization groups on every tensor-parallel rank need them to be."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.checkpoint.store.destinations import Artifact, Destination
from qwen_pipeline.checkpoint.store.rewrite import Rewrite
from qwen_pipeline.checkpoint.store.stage_input import StageInput, open_input
from qwen_pipeline.models.open import open_model
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.qwen.channels import sized_tensors
from qwen_pipeline.qwen.config import require_full_precision
from qwen_pipeline.qwen.geometry import PadPlan, attention_obstacles, dump_plan
from qwen_pipeline.qwen.layers import required
from qwen_pipeline.qwen.padding_spec import Layout, PaddingSpec
from qwen_pipeline.qwen.tensor_parallel.plan import USUAL_ENGINE, plan_for
from qwen_pipeline.qwen.tensor_parallel.towers import tower_obstacles
from qwen_pipeline.reports import CheckReport, CheckSpec, dump_reports
from qwen_pipeline.transforms.padding.pad import pad as pad_checkpoint
from qwen_pipeline.transforms.padding.splitting import choose_splits

STAGE = "padded"
CODE_VERSION = "5"
CHECKS = (
    CheckSpec(name="width_divides", description="Every rank holds whole quantization groups of every MLP."),
    CheckSpec(
        name="padding_is_silent",
        description="Live channels are unchanged and new ones zero, or both are parts that add up to what was live.",
    ),
    CheckSpec(name="config_follows_weights", description="The config states the padded width; nothing else changed."),
    CheckSpec(
        name="attention_divides",
        description="Attention heads and o_proj groups divide by the degree too, where padding cannot help; and so do"
        " towers, where it can on request.",
        blocking=False,
    ),
)

DEFAULT_SPEC = PaddingSpec()


def pad(
    *,
    source: Path,
    destination: Destination,
    spec: PaddingSpec = DEFAULT_SPEC,
    hard_links: bool = False,
    observe: Observe = unobserved,
) -> Artifact:
    """Pad a full-precision checkpoint so that it can be quantized in groups and served by several ranks.

    A width that divides already is a valid outcome: the weights are then carried unchanged, as hard links to the
    source's own files if ``hard_links`` allows that. The manifest says how to undo it.

    Raises:
        QuantizedInputRefused: The input is quantized; padding comes before quantization.
        InputRefused: The family cannot be padded, weights and config disagree, or no padding lets the targets serve.
    """
    live = open_input("source", source, open_root=open_model, read_now=destination.may_hold(STAGE), observe=observe)
    return prepare(live, spec).write(destination, task="pad", hard_links=hard_links, observe=observe)


def prepare(source: StageInput, spec: PaddingSpec) -> Rewrite:
    """Check a padding and say what it is derived from and what it writes; see :func:`pad`."""
    live = source.checkpoint
    require_full_precision(
        live,
        because="The order is merge, then pad, then quantize: packed codes and group scales cannot take the channels"
        " that padding adds to full-precision tensors.",
        remedy="Pad the merged full-precision checkpoint, then quantize again.",
    )
    plan = choose_splits(live, plan_for(live.config, spec))
    padded = pad_checkpoint(live, plan)
    reports = [
        _width_report(plan, spec.ranks),
        _silence_report(live, plan, spec.layout),
        _config_report(live, padded, plan),
        _attention_report(padded.config, spec),
    ]
    return Rewrite(
        stage=STAGE,
        code_version=CODE_VERSION,
        spec=spec.to_json(),
        sources={"source": source},
        output=padded,
        result=lambda: {**_way_back(live, plan), "checks": dump_reports(reports)},
    )


def _way_back(live: Checkpoint, plan: PadPlan) -> dict[str, Any]:
    """Return what unpadding needs: where channels went, and the config as it was written."""
    config = live.config_bytes.decode() if live.config_bytes and plan.changes else None
    return {"padding": dump_plan(plan), "live_config": config}


def _width_report(plan: PadPlan, ranks: int) -> CheckReport:
    unit = plan.group_size * plan.tensor_parallel
    units = {size.field: ranks if size.of_tower else unit for size in plan.sizes}
    has_towers = any(size.of_tower for size in plan.sizes)
    return CheckReport(
        name=CHECKS[0].name,
        passed=all(size.padded % units[size.field] == 0 for size in plan.sizes),
        measured=plan.sizes[0].padded if len(plan.sizes) == 1 else ", ".join(f"{size.padded}" for size in plan.sizes),
        limit=f"a multiple of {plan.group_size} x {plan.tensor_parallel} = {unit}"
        + (f", in towers of {ranks}" if has_towers else ""),
        detail=" ".join(
            f"{size.live} live channels in {size.padded}: {size.padded // units[size.field]}"
            f" {'channels of a tower' if size.of_tower else 'whole groups'} on each rank."
            for size in plan.sizes
        ),
    )


def _silence_report(live: Checkpoint, plan: PadPlan, layout: Layout) -> CheckReport:
    count = sum(len(sized_tensors(live, size.field)) for size in plan.sizes)
    return CheckReport(
        name=CHECKS[1].name,
        passed=True,
        measured=f"{count} tensors",
        detail="By construction: of a down column that is split, one part is its half and the other what that leaves;"
        " all else is copied."
        if layout == "split"
        else "By construction: each block starts as zeros, and the live channels are copied into it as they are;"
        " nothing is computed.",
    )


def _config_report(live: Checkpoint, padded: Checkpoint, plan: PadPlan) -> CheckReport:
    for size in plan.sizes:
        sized_tensors(padded, size.field)
    moved = _changed_fields(live.config, padded.config)
    places = [place for size in plan.sizes for place in size.places]
    widths = ", ".join(f"{size.field} {size.padded}" for size in plan.sizes)
    return CheckReport(
        name=CHECKS[2].name,
        passed=all(required(padded.config, size.field) == size.padded for size in plan.sizes) and moved <= set(places),
        measured=", ".join(sorted(moved)) or "unchanged",
        limit=", ".join(places),
        detail=f"Config and weights both have {widths}; hidden_size and all other fields stay.",
    )


def _attention_report(config: Mapping[str, Any], spec: PaddingSpec) -> CheckReport:
    group_size, degrees = spec.group_size, spec.degrees
    obstacles = [
        f"at degree {degree} {obstacle}"
        for degree in degrees
        for obstacle in attention_obstacles(config, group_size=group_size, tensor_parallel=degree)
    ]
    of_towers = tower_obstacles(config, spec.targets or {USUAL_ENGINE: degrees})
    asked = ", ".join(map(str, degrees))
    choose = f"Choose another degree or group size than {asked} and {group_size} for serving."
    return CheckReport(
        name=CHECKS[3].name,
        passed=not (obstacles or of_towers),
        severity="WARN",
        measured="; ".join([*obstacles, *["towers are refused"] * bool(of_towers)]) or None,
        detail=" ".join([choose] * bool(obstacles) + of_towers) or f"Heads and o_proj divide by {asked}.",
    )


def _changed_fields(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    """Return the paths of the fields that differ, however deep."""
    changed: set[str] = set()
    for field in before.keys() | after.keys():
        old, new = before.get(field), after.get(field)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed |= {f"{field}.{path}" for path in _changed_fields(old, new)}
        elif old != new:
            changed.add(field)
    return changed
