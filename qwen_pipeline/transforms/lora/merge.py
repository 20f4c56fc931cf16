"""The merge of adapters into a base: every adapter tensor is assigned unambiguously, or nothing is merged."""

from dataclasses import dataclass, replace

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import AdapterRefused, listed
from qwen_pipeline.qwen.config import FULL_PRECISION_BASE, require_full_precision
from qwen_pipeline.qwen.settle import require_sizes
from qwen_pipeline.transforms.lora.across_padding import PaddingBridge, Paddings, padding_bridge
from qwen_pipeline.transforms.lora.adapter import require_finite
from qwen_pipeline.transforms.lora.adapter_set import AdapterSet, Member
from qwen_pipeline.transforms.lora.assignment import assign
from qwen_pipeline.transforms.lora.changes import ChangeMeter
from qwen_pipeline.transforms.lora.completeness import completeness_obstacles
from qwen_pipeline.transforms.lora.plan import MergePlan
from qwen_pipeline.transforms.lora.saved.experts import with_expert_layout
from qwen_pipeline.transforms.lora.task_head import with_task_head
from qwen_pipeline.transforms.lora.vocabulary import apply_plan, start_from_copies, untied, vocabulary_of

NO_PADDING = Paddings()


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """A merged checkpoint, and the tensors of the base that each adapter tensor was merged into.

    Attributes:
        checkpoint: The merged checkpoint, at the base's width.
        plan: The merge plan, at the width that the adapters were trained at.
        bridge: The padding between the two widths; None if they are the same.
    """

    checkpoint: Checkpoint
    plan: MergePlan
    bridge: PaddingBridge | None = None


def merge_lora(
    base: Checkpoint,
    adapters: AdapterSet,
    *,
    paddings: Paddings = NO_PADDING,
    meter: ChangeMeter | None = None,
    check_values: bool = True,
) -> Merged:
    """Return the base with all adapter tensors merged; all other tensors, shards and the config stay unchanged.

    The config changes only if the vocabulary was resized, embedding and head are no longer tied, or the adapters were
    trained with another head, which then takes the place of the base's.

    Args:
        base: A checkpoint in full precision.
        adapters: The adapters to merge.
        paddings: The padding of the base and of the model that the adapters were trained on, as far as it is known.
        meter: Measures the changes as the merged tensors are read.
        check_values: Whether to read all values of the adapters, which must be finite.

    Raises:
        QuantizedInputRefused: The base is quantized.
        CheckpointRefused: The base's weights have other sizes than its config.
        AdapterRefused: An adapter tensor matches no tensor of the base, several, or one of another shape, or is not
            finite; or a tensor that the settings require is missing; or the adapter uses channels that padding added
            and the base does not have. Nothing is skipped.
    """
    require_full_precision(
        base,
        because=f"A LoRA is merged into the full-precision weights that it was trained on{_base_names(adapters)}.",
        remedy=FULL_PRECISION_BASE,
    )
    base = with_task_head(require_sizes(base), adapters)
    adapters = replace(adapters, members=tuple(_laid_out(member, base) for member in adapters.members))
    bridge = padding_bridge(base, adapters, paddings)
    trained = bridge.to_trained_width(base) if bridge else base
    merged = _merge_same_width(trained, adapters, meter)
    for adapter in adapters.adapters if check_values else ():
        require_finite(adapter)
    if bridge is None:
        return merged
    bridge.require_added_channels_unused(merged.plan)
    return replace(merged, checkpoint=bridge.to_base_width(base, trained, merged.checkpoint), bridge=bridge)


def _laid_out(member: Member, base: Checkpoint) -> Member:
    return replace(member, adapter=with_expert_layout(member.adapter, base))


def _merge_same_width(base: Checkpoint, adapters: AdapterSet, meter: ChangeMeter | None) -> Merged:
    vocabulary = vocabulary_of(base)
    plan = MergePlan(base=untied(base, vocabulary), resizable=vocabulary.names, meter=meter)
    for adapter in adapters.adapters:
        start_from_copies(plan, vocabulary, adapter)
    assign(plan, adapters)
    for adapter in adapters.adapters:
        plan.obstacles.extend(completeness_obstacles(plan, adapter, vocabulary))
    must_tie = any(adapter.settings.ensure_weight_tying for adapter in adapters.adapters)
    merged = apply_plan(plan, base, vocabulary, must_tie=must_tie)
    plan.obstacles.extend(plan.unused(adapters.adapters) if not plan.obstacles else ())
    if plan.obstacles:
        raise AdapterRefused(
            f"{len(plan.obstacles)} tensors or modules of {_roots(adapters)} cannot be merged into this base: "
            f"{listed(plan.obstacles)}.",
            remedy=f"Use the base that the adapter was trained on{_base_names(adapters)}, and provide all files that"
            " PEFT saved. If it was trained on a padded checkpoint of this base, pass that one as --trained-on.",
        )
    return Merged(checkpoint=merged, plan=plan)


def _roots(adapters: AdapterSet) -> str:
    return ", ".join(str(adapter.root) for adapter in adapters.adapters)


def _base_names(adapters: AdapterSet) -> str:
    names = {name for adapter in adapters.adapters if (name := adapter.base_name)}
    return f" ({', '.join(sorted(names))})" if names else ""
