"""Merging adapters into a base: everything they bring has exactly one place, or nothing is merged."""

from dataclasses import dataclass

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import AdapterRefused, listed
from qwen_pipeline.qwen.precision import require_full_precision
from qwen_pipeline.transforms.adapter import require_finite
from qwen_pipeline.transforms.adapter_set import AdapterSet
from qwen_pipeline.transforms.expectations import unfulfilled
from qwen_pipeline.transforms.landing import land
from qwen_pipeline.transforms.recipes import MergePlan
from qwen_pipeline.transforms.vocabulary import finish, separated, start_from_copies, vocabulary_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What merging gives, and which tensors of the adapters land where."""

    checkpoint: Checkpoint
    plan: MergePlan


def merge_lora(base: Checkpoint, adapters: AdapterSet) -> Merged:
    """Return the base with everything that the adapters bring; all other tensors, shards and the config stay.

    The config changes where a vocabulary was resized, or embedding and head are no longer one tensor.

    Raises:
        QuantizedInputRefused: The base is quantized.
        AdapterRefused: A tensor of an adapter has no place in the base, or several, or another shape than its place, or
            is not finite; or one is missing that the settings promise. Nothing is skipped.
    """
    merged = plan_merge(base, adapters)
    for adapter in adapters.adapters:
        require_finite(adapter)
    return merged


def plan_merge(base: Checkpoint, adapters: AdapterSet) -> Merged:
    """Do as :func:`merge_lora`, without a look at the adapters' factors."""
    require_full_precision(
        base,
        because=f"A LoRA is merged into the full-precision weights it belongs to{_named(adapters)}.",
        remedy="Name the full-precision base; quantize after merging (merge, then pad, then quantize).",
    )
    vocabulary = vocabulary_of(base)
    plan = MergePlan(base=separated(base, vocabulary), resizable=vocabulary.names)
    for adapter in adapters.adapters:
        start_from_copies(plan, vocabulary, adapter)
    land(plan, adapters)
    for adapter in adapters.adapters:
        plan.obstacles.extend(unfulfilled(plan, adapter, vocabulary))
    must_tie = any(adapter.settings.ensure_weight_tying for adapter in adapters.adapters)
    merged = finish(plan, base, vocabulary, must_tie=must_tie)
    plan.obstacles.extend(plan.unused(adapters.adapters) if not plan.obstacles else ())
    if plan.obstacles:
        raise AdapterRefused(
            f"{len(plan.obstacles)} of what {_roots(adapters)} brings cannot be merged into this base: "
            f"{listed(plan.obstacles)}.",
            remedy=f"Name the base that the adapter was trained on{_named(adapters)}, and hand in all that was saved.",
        )
    return Merged(checkpoint=merged, plan=plan)


def _roots(adapters: AdapterSet) -> str:
    return ", ".join(str(adapter.root) for adapter in adapters.adapters)


def _named(adapters: AdapterSet) -> str:
    names = {name for adapter in adapters.adapters if (name := adapter.base_name)}
    return f" ({', '.join(sorted(names))})" if names else ""
