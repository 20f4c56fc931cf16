"""Merging adapters into a base: everything they bring has exactly one place, or nothing is merged."""

from dataclasses import dataclass, replace

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import AdapterRefused, listed
from qwen_pipeline.qwen.config import require_full_precision
from qwen_pipeline.transforms.lora.across_padding import PaddingBridge, Paddings, padding_bridge
from qwen_pipeline.transforms.lora.adapter import require_finite
from qwen_pipeline.transforms.lora.adapter_set import AdapterSet
from qwen_pipeline.transforms.lora.assignment import assign
from qwen_pipeline.transforms.lora.completeness import unfulfilled
from qwen_pipeline.transforms.lora.plan import MergePlan
from qwen_pipeline.transforms.lora.vocabulary import finish, separated, start_from_copies, vocabulary_of

NO_PADDING = Paddings()


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What merging gives, and which tensors of the adapters land where.

    Attributes:
        checkpoint: Of the base's width.
        plan: Of the width that the adapters were trained at.
        bridge: The padding between the two, if there is any.
    """

    checkpoint: Checkpoint
    plan: MergePlan
    bridge: PaddingBridge | None = None


def merge_lora(base: Checkpoint, adapters: AdapterSet, *, paddings: Paddings = NO_PADDING) -> Merged:
    """Return the base with everything that the adapters bring; all other tensors, shards and the config stay.

    The config changes where a vocabulary was resized, or embedding and head are no longer one tensor.

    Args:
        base: Full-precision weights.
        adapters: What is merged.
        paddings: How base and training differ in width.

    Raises:
        QuantizedInputRefused: The base is quantized.
        AdapterRefused: A tensor of an adapter has no place in the base, or several, or another shape than its place, or
            is not finite; or one is missing that the settings promise; or a channel that padding added cannot be left
            out. Nothing is skipped.
    """
    require_full_precision(
        base,
        because=f"A LoRA is merged into the full-precision weights it belongs to{_named(adapters)}.",
        remedy="Name the full-precision base; quantize after merging (merge, then pad, then quantize).",
    )
    bridge = padding_bridge(base, adapters, paddings)
    trained = bridge.enter(base) if bridge else base
    merged = _planned(trained, adapters)
    for adapter in adapters.adapters:
        require_finite(adapter)
    if bridge is None:
        return merged
    bridge.require_silent(merged.plan)
    return replace(merged, checkpoint=bridge.leave(base, trained, merged.checkpoint), bridge=bridge)


def _planned(base: Checkpoint, adapters: AdapterSet) -> Merged:
    vocabulary = vocabulary_of(base)
    plan = MergePlan(base=separated(base, vocabulary), resizable=vocabulary.names)
    for adapter in adapters.adapters:
        start_from_copies(plan, vocabulary, adapter)
    assign(plan, adapters)
    for adapter in adapters.adapters:
        plan.obstacles.extend(unfulfilled(plan, adapter, vocabulary))
    must_tie = any(adapter.settings.ensure_weight_tying for adapter in adapters.adapters)
    merged = finish(plan, base, vocabulary, must_tie=must_tie)
    plan.obstacles.extend(plan.unused(adapters.adapters) if not plan.obstacles else ())
    if plan.obstacles:
        raise AdapterRefused(
            f"{len(plan.obstacles)} of what {_roots(adapters)} brings cannot be merged into this base: "
            f"{listed(plan.obstacles)}.",
            remedy=f"Name the base that the adapter was trained on{_named(adapters)}, and hand in all that was saved."
            " If it was trained on a padded checkpoint of this base, name that one with --trained-on.",
        )
    return Merged(checkpoint=merged, plan=plan)


def _roots(adapters: AdapterSet) -> str:
    return ", ".join(str(adapter.root) for adapter in adapters.adapters)


def _named(adapters: AdapterSet) -> str:
    names = {name for adapter in adapters.adapters if (name := adapter.base_name)}
    return f" ({', '.join(sorted(names))})" if names else ""
