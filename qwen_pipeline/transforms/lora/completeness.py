"""What an adapter's settings promise, so that a lost tensor is missed: saved modules, biases, tokens, vocabulary."""

from collections.abc import Iterable, Iterator

from qwen_pipeline.qwen.names import parse_name
from qwen_pipeline.qwen.tensor_slices import slices_of
from qwen_pipeline.transforms.lora.adapter import Adapter
from qwen_pipeline.transforms.lora.lazy_ops import are_equal, stored
from qwen_pipeline.transforms.lora.plan import MergePlan
from qwen_pipeline.transforms.lora.vocabulary import Vocabulary

_ALWAYS = ("decoder", "embedding", "norm", "head")
"""Parts that every training loads; the others count as trained only if the adapter has a tensor of them."""


def unfulfilled(plan: MergePlan, adapter: Adapter, vocabulary: Vocabulary) -> Iterator[str]:
    """Yield what PEFT would have saved and is not there, or is there twice with different values, with the reason."""
    yield from _lost_weights(plan, adapter)
    yield from _lost_biases(plan, adapter)
    yield from _lost_tokens(adapter, vocabulary)
    yield from _lost_half(plan, adapter, vocabulary)
    for twin, parameter in adapter.tensors.twins.items():
        name = adapter.tensors.saved[parameter]
        if not are_equal(stored(adapter.weights, twin), stored(adapter.weights, name)):
            yield f"{twin} (other values than {name}, which it repeats)"


def _lost_weights(plan: MergePlan, adapter: Adapter) -> Iterator[str]:
    """Yield what ``modules_to_save`` and ``bias="all"`` ask for, of the parts of the model that were trained."""
    settings, config = adapter.settings, plan.base.config
    if not settings.modules_to_save and settings.bias != "all":
        return
    brought = _stored_names(plan, adapter.tensors.saved)
    parts = {parse_name(name, config).part for name, recipe in plan.recipes.items() if recipe.uses} | {*_ALWAYS}
    for name in plan.base:
        module, _, parameter = name.rpartition(".")
        module = module.partition(".experts")[0]
        is_asked = settings.saves(module) or (settings.bias == "all" and parameter == "bias")
        if is_asked and name not in brought and parse_name(name, config).part in parts:
            yield f"{name} (the settings save it, it is not there)"


def _lost_biases(plan: MergePlan, adapter: Adapter) -> Iterator[str]:
    if adapter.settings.bias == "lora_only":
        biases = [f"{parameter.removesuffix('.weight')}.bias" for parameter in adapter.tensors.factors]
        for name in sorted(_stored_names(plan, biases) - _stored_names(plan, adapter.tensors.saved)):
            yield f"{name} (bias is lora_only, it is not there)"


def _lost_tokens(adapter: Adapter, vocabulary: Vocabulary) -> Iterator[str]:
    modules = adapter.tensors.tokens
    held = [adapter.settings.tokens_of(module) for module in modules]
    for name, rows in adapter.settings.trainable_token_indices.items():
        is_shared = vocabulary.tied and rows in held
        if not is_shared and not any(module.endswith(name) for module in modules):
            yield f"{name} (trainable_token_indices, its rows are not there)"


def _lost_half(plan: MergePlan, adapter: Adapter, vocabulary: Vocabulary) -> Iterator[str]:
    """Yield embedding or head where only the other was saved unasked: PEFT saves both of a resized vocabulary."""
    tensors = adapter.tensors
    unasked = [path for path in tensors.saved if path.endswith(".weight") and not adapter.settings.saves(path[:-7])]
    if unasked:
        modules = (*tensors.copies, *tensors.tokens)
        held = _stored_names(plan, [*tensors.saved, *tensors.factors, *(f"{module}.weight" for module in modules)])
        for name in vocabulary.names:
            if name not in held:
                yield f"{name} ({tensors.saved[unasked[0]]} is there as part of a vocabulary, this is not)"


def _stored_names(plan: MergePlan, parameters: Iterable[str]) -> set[str]:
    return {slot.name for parameter in parameters for slot in slices_of(parameter, plan.base)}
