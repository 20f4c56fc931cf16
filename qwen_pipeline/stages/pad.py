"""``merged -> padded``: MLPs widened so that every tensor-parallel rank holds whole quantization groups."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.checkpoint.store.destinations import Artifact, Destination, as_destination
from qwen_pipeline.checkpoint.store.rewrite import Rewrite
from qwen_pipeline.checkpoint.store.stage_input import StageInput, open_input
from qwen_pipeline.models.open import open_model, with_weights
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.qwen.channels import sized_tensors
from qwen_pipeline.qwen.config import diff_configs, require_full_precision
from qwen_pipeline.qwen.geometry import PadPlan, attention_obstacles, dump_plan
from qwen_pipeline.qwen.layers import required
from qwen_pipeline.qwen.padding_spec import Layout, PaddingSpec
from qwen_pipeline.qwen.settle import CONFIG_MATCHES, config_report, require_sizes, settle
from qwen_pipeline.qwen.tensor_parallel.plan import USUAL_ENGINE, plan_for
from qwen_pipeline.qwen.tensor_parallel.towers import tower_obstacles
from qwen_pipeline.reports import CheckReport, CheckSpec, dump_reports
from qwen_pipeline.transforms.codes.base_weights import AS_STORED, BaseWeights
from qwen_pipeline.transforms.padding.pad import pad as pad_checkpoint
from qwen_pipeline.transforms.padding.splitting import choose_splits
from qwen_pipeline.transforms.tokenizer_fits import TOKENIZER_FITS, tokenizer_report

STAGE = "padded"
CODE_VERSION = "6"
WIDTH_DIVIDES = CheckSpec(name="width_divides", description="Every rank holds whole quantization groups of every MLP.")
PADDING_IS_SILENT = CheckSpec(
    name="padding_is_silent",
    description="Live channels are unchanged and new ones are zero, or a split channel's parts add up to the live one.",
)
CONFIG_FOLLOWS = CheckSpec(
    name="config_follows_weights", description="The config states the padded width; nothing else changed."
)
ATTENTION_DIVIDES = CheckSpec(
    name="attention_divides",
    description="Attention heads and o_proj groups, which padding cannot change, divide by the degree, and so do"
    " towers, which are padded only on request.",
    blocking=False,
)
CHECKS = (WIDTH_DIVIDES, PADDING_IS_SILENT, CONFIG_FOLLOWS, ATTENTION_DIVIDES, CONFIG_MATCHES, TOKENIZER_FITS)

DEFAULT_SPEC = PaddingSpec()


def pad(
    *,
    source: Path,
    destination: Destination | Path,
    spec: PaddingSpec = DEFAULT_SPEC,
    dequantize: bool = False,
    hard_links: bool = False,
    observe: Observe = unobserved,
) -> Artifact:
    """Pad a full-precision checkpoint so that it can be quantized in groups and served by several ranks.

    If every width already divides, the weights are copied unchanged. The manifest records the data that unpadding
    needs.

    Args:
        source: The merged checkpoint, stored or a recipe.
        destination: The output directory.
        spec: The target geometry.
        dequantize: Whether a quantized source is read as the full precision that its codes stand for.
        hard_links: Whether a shard that padding does not change may be a hard link to the source's file.
        observe: Called with the progress.

    Raises:
        QuantizedInputRefused: The input is quantized; padding comes before quantization.
        InputRefused: The family cannot be padded, weights and config disagree, or padding cannot make the targets
            serve.
    """
    read_now = as_destination(destination).may_hold(STAGE)
    live = open_input("source", source, open_root=open_model, read_now=read_now, observe=observe)
    rewrite = prepare(live, spec, BaseWeights(dequantize=dequantize))
    artifact = rewrite.write(destination, task="pad", hard_links=hard_links, observe=observe)
    return with_weights(artifact, observe=observe)


def prepare(source: StageInput, spec: PaddingSpec, weights: BaseWeights = AS_STORED) -> Rewrite:
    """Check a padding and return its derivation and its lazy output; see :func:`pad`."""
    stored = weights.of(source.checkpoint)
    require_full_precision(
        stored,
        because="The order is merge, then pad, then quantize: packed codes and group scales cannot take the channels"
        " that padding adds to full-precision tensors.",
        remedy="Pad the merged full-precision checkpoint, then quantize again. If there is none, read the codes as the"
        " full precision that they stand for: --base-dequantize.",
    )
    settled = settle(stored)
    live = settled.checkpoint
    plan = choose_splits(live, plan_for(live.config, spec))
    padded = pad_checkpoint(live, plan)
    require_sizes(live)
    reports = [
        _width_report(plan, spec.ranks),
        _zero_effect_report(live, plan, spec.layout),
        _config_report(live, padded, plan),
        _attention_report(padded.config, spec),
        config_report(settled),
        tokenizer_report(padded),
    ]
    return Rewrite(
        stage=STAGE,
        code_version=CODE_VERSION,
        spec=spec.to_json() | weights.spec(source.checkpoint),
        sources={"source": source},
        output=padded,
        result=lambda: {
            **_unpad_data(stored, plan, changes=plan.changes or settled.checkpoint is not stored),
            "left_behind": list(settled.left_behind),
            "split": list(settled.split),
            "checks": dump_reports(reports),
        },
    )


def _unpad_data(stored: Checkpoint, plan: PadPlan, *, changes: bool) -> dict[str, Any]:
    """Return the data that unpadding needs: the map of the channels, and the original text of a config that changes."""
    config = stored.config_bytes.decode() if stored.config_bytes and changes else None
    return {"padding": dump_plan(plan), "live_config": config}


def _width_report(plan: PadPlan, ranks: int) -> CheckReport:
    unit = plan.group_size * plan.tensor_parallel
    units = {size.field: ranks if size.of_tower else unit for size in plan.sizes}
    has_towers = any(size.of_tower for size in plan.sizes)
    return WIDTH_DIVIDES.report(
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


def _zero_effect_report(live: Checkpoint, plan: PadPlan, layout: Layout) -> CheckReport:
    count = sum(len(sized_tensors(live, size.field)) for size in plan.sizes)
    return PADDING_IS_SILENT.report(
        passed=True,
        measured=f"{count} tensors",
        detail="By construction: a split down column becomes its half and the remainder; everything else is copied."
        if layout == "split"
        else "By construction: each block starts as zeros, and the live channels are copied into it; nothing is"
        " computed.",
    )


def _config_report(live: Checkpoint, padded: Checkpoint, plan: PadPlan) -> CheckReport:
    for size in plan.sizes:
        sized_tensors(padded, size.field)
    changed = diff_configs(live.config, padded.config).keys()
    places = [place for size in plan.sizes for place in size.places]
    widths = ", ".join(f"{size.field} {size.padded}" for size in plan.sizes)
    return CONFIG_FOLLOWS.report(
        passed=all(required(padded.config, size.field) == size.padded for size in plan.sizes)
        and changed <= set(places),
        measured=", ".join(sorted(changed)) or "unchanged",
        limit=", ".join(places),
        detail=f"Config and weights both have {widths}; hidden_size and all other fields are unchanged.",
    )


def _attention_report(config: Mapping[str, Any], spec: PaddingSpec) -> CheckReport:
    group_size, degrees = spec.group_size, spec.degrees
    obstacles = [
        f"at degree {degree} {obstacle}"
        for degree in degrees
        for obstacle in attention_obstacles(config, group_size=group_size, tensor_parallel=degree)
    ]
    tower_faults = tower_obstacles(config, spec.targets or {USUAL_ENGINE: degrees})
    listed_degrees = ", ".join(map(str, degrees))
    remedy = f"Serve on another number of ranks than {listed_degrees}, or choose another group size than {group_size}."
    return ATTENTION_DIVIDES.report(
        passed=not (obstacles or tower_faults),
        measured="; ".join([*obstacles, *["towers are refused"] * bool(tower_faults)]) or None,
        detail=" ".join([remedy] * bool(obstacles) + tower_faults) or f"Heads and o_proj divide by {listed_degrees}.",
    )
