"""merged -> padded: MLPs as wide as whole quantization groups on every tensor-parallel rank need them to be."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.checkpoint.rewrite import Rewrite
from qwen_pipeline.checkpoint.source import Source, open_source
from qwen_pipeline.checkpoint.store import Artifact, Destination
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.qwen.channels import sized_tensors
from qwen_pipeline.qwen.geometry import Layout, PadPlan, attention_obstacles, dump_plan, plan_padding
from qwen_pipeline.qwen.precision import require_full_precision
from qwen_pipeline.reports import CheckReport, CheckSpec, dump_reports
from qwen_pipeline.transforms.model import open_model
from qwen_pipeline.transforms.padding import pad as pad_checkpoint

STAGE = "padded"
CODE_VERSION = "3"
CHECKS = (
    CheckSpec(name="width_divides", description="Every rank holds whole quantization groups of every MLP."),
    CheckSpec(name="padding_is_zero", description="Live channels are unchanged, all others are exactly zero."),
    CheckSpec(name="config_follows_weights", description="The config states the padded width; nothing else changed."),
    CheckSpec(
        name="attention_divides",
        description="Attention heads and o_proj groups divide by the degree too; padding cannot help there.",
        blocking=False,
    ),
)


def pad(
    *,
    source: Path,
    destination: Destination,
    group_size: int = 128,
    tensor_parallel: int = 8,
    layout: Layout = "interleave",
    hard_links: bool = False,
    observe: Observe = unobserved,
) -> Artifact:
    """Pad a full-precision checkpoint so that it can be quantized in groups and served by ``tensor_parallel`` ranks.

    A width that divides already is a valid outcome: the weights are then carried unchanged, as second names of the
    source's own files if ``hard_links`` allows that.

    Raises:
        QuantizedInputRefused: The input is quantized; padding comes before quantization.
        InputRefused: The family cannot be padded, or weights and config disagree.
    """
    live = open_source("source", source, open_root=open_model, read_now=destination.may_hold(STAGE), observe=observe)
    work = prepare(live, group_size=group_size, tensor_parallel=tensor_parallel, layout=layout)
    return work.write(destination, task="pad", hard_links=hard_links, observe=observe)


def prepare(source: Source, *, group_size: int, tensor_parallel: int, layout: Layout) -> Rewrite:
    """Check a padding and say what it is derived from and what it writes; see :func:`pad`."""
    live = source.checkpoint
    require_full_precision(
        live,
        because="The order is merge, then pad, then quantize: packed codes and group scales cannot take the channels"
        " that padding adds to full-precision tensors.",
        remedy="Pad the merged full-precision checkpoint, then quantize again.",
    )
    plan = plan_padding(live.config, group_size=group_size, tensor_parallel=tensor_parallel, layout=layout)
    padded = pad_checkpoint(live, plan)
    reports = [
        _width_report(plan),
        _zero_report(live, plan),
        _config_report(live, padded, plan),
        _attention_report(plan, live.config),
    ]
    return Rewrite(
        stage=STAGE,
        code_version=CODE_VERSION,
        spec={"group_size": group_size, "tensor_parallel": tensor_parallel, "layout": layout},
        sources={"source": source},
        output=padded,
        result={"padding": dump_plan(plan), "checks": dump_reports(reports)},
    )


def _width_report(plan: PadPlan) -> CheckReport:
    unit = plan.group_size * plan.tensor_parallel
    widths = [f"{size.padded}" for size in plan.sizes]
    return CheckReport(
        name=CHECKS[0].name,
        passed=all(size.padded % unit == 0 for size in plan.sizes),
        measured=plan.sizes[0].padded if len(widths) == 1 else ", ".join(widths),
        limit=f"a multiple of {plan.group_size} x {plan.tensor_parallel} = {unit}",
        detail=" ".join(
            f"{size.live} live channels in {size.padded}: {size.padded // unit} whole groups on each rank."
            for size in plan.sizes
        ),
    )


def _zero_report(live: Checkpoint, plan: PadPlan) -> CheckReport:
    count = sum(len(sized_tensors(live, size.field)) for size in plan.sizes)
    return CheckReport(
        name=CHECKS[1].name,
        passed=True,
        measured=f"{count} tensors",
        detail="By construction: each block starts as zeros, and the live channels are copied into it as they are;"
        " nothing is computed.",
    )


def _config_report(live: Checkpoint, padded: Checkpoint, plan: PadPlan) -> CheckReport:
    for size in plan.sizes:
        sized_tensors(padded, size.field)
    stated = plan_padding(padded.config, group_size=plan.group_size, tensor_parallel=plan.tensor_parallel)
    moved = _changed_fields(live.config, padded.config)
    places = [place for size in plan.sizes for place in size.places]
    widths = ", ".join(f"{size.field} {size.padded}" for size in plan.sizes)
    return CheckReport(
        name=CHECKS[2].name,
        passed=[size.live for size in stated.sizes] == [size.padded for size in plan.sizes] and moved <= set(places),
        measured=", ".join(sorted(moved)) or "unchanged",
        limit=", ".join(places),
        detail=f"Config and weights both have {widths}; hidden_size and all other fields stay.",
    )


def _attention_report(plan: PadPlan, config: Mapping[str, Any]) -> CheckReport:
    obstacles = attention_obstacles(config, group_size=plan.group_size, tensor_parallel=plan.tensor_parallel)
    return CheckReport(
        name=CHECKS[3].name,
        passed=not obstacles,
        severity="WARN",
        measured="; ".join(obstacles) or None,
        detail=f"Choose another degree or group size than {plan.tensor_parallel} and {plan.group_size} for serving."
        if obstacles
        else f"Heads and o_proj divide by {plan.tensor_parallel}.",
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
