"""Merging adapters into a base: everything they bring has exactly one place, or nothing is merged."""

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import AdapterRefused, listed
from qwen_pipeline.qwen.precision import require_full_precision
from qwen_pipeline.transforms.adapter import require_finite
from qwen_pipeline.transforms.adapter_set import AdapterSet
from qwen_pipeline.transforms.expectations import unfulfilled
from qwen_pipeline.transforms.landing import land
from qwen_pipeline.transforms.recipes import MergePlan
from qwen_pipeline.transforms.vocabulary import finish, separated, start_from_copies, vocabulary_of


def merge_lora(base: Checkpoint, adapters: AdapterSet) -> Checkpoint:
    """Return the base with everything that the adapters bring; all other tensors, shards and the config stay.

    The config changes where a vocabulary was resized, or embedding and head are no longer one tensor.

    Raises:
        QuantizedInputRefused: The base is quantized.
        AdapterRefused: A tensor of an adapter has no place in the base, or several, or another shape than its place, or
            is not finite; or one is missing that the settings promise. Nothing is skipped.
    """
    for adapter in (member.adapter for member in adapters.members):
        require_finite(adapter)
    return plan_merge(base, adapters)[0]


def plan_merge(base: Checkpoint, adapters: AdapterSet) -> tuple[Checkpoint, MergePlan]:
    """Return what merging gives, and the plan that says which tensors land where; no weight is computed yet.

    Raises:
        As :func:`merge_lora`, without a look at the adapters' values.
    """
    require_full_precision(
        base,
        because=f"A LoRA is merged into the full-precision weights it belongs to{_named(adapters)}.",
        remedy="Name the full-precision base; quantize after merging (merge, then pad, then quantize).",
    )
    vocabulary = vocabulary_of(base)
    plan = MergePlan(base=separated(base, vocabulary), resizable=vocabulary.names)
    members = [member.adapter for member in adapters.members]
    for adapter in members:
        start_from_copies(plan, vocabulary, adapter)
    land(plan, adapters)
    for adapter in members:
        plan.obstacles.extend(unfulfilled(plan, adapter, vocabulary))
    must_tie = any(adapter.settings.ensure_weight_tying for adapter in members)
    merged = finish(plan, base, vocabulary, must_tie=must_tie)
    if plan.obstacles:
        raise AdapterRefused(
            f"{len(plan.obstacles)} of what {_roots(adapters)} brings cannot be merged into this base: "
            f"{listed(plan.obstacles)}.",
            remedy=f"Name the base that the adapter was trained on{_named(adapters)}, and hand in all that was saved.",
        )
    return merged, plan


def _roots(adapters: AdapterSet) -> str:
    return ", ".join(str(member.adapter.root) for member in adapters.members)


def _named(adapters: AdapterSet) -> str:
    names = {name for member in adapters.members if (name := member.adapter.base_name)}
    return f" ({', '.join(sorted(names))})" if names else ""
