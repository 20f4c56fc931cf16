"""Detection of missing tensors: saved modules, biases, tokens and vocabulary that an adapter's settings require."""

from collections.abc import Iterable, Iterator

from qwen_pipeline.checkpoint.hashing_reader import are_equal
from qwen_pipeline.qwen.names import parse_name
from qwen_pipeline.qwen.tensor_slices import slices_of
from qwen_pipeline.transforms.lora.adapter import Adapter
from qwen_pipeline.transforms.lora.lazy_ops import lazy_tensor
from qwen_pipeline.transforms.lora.plan import MergePlan
from qwen_pipeline.transforms.lora.vocabulary import Vocabulary

_ALWAYS_LOADED = ("decoder", "embedding", "norm", "head")
"""Parts that are loaded for every training; another part counts as trained only if the adapter has a tensor of it."""


def completeness_obstacles(plan: MergePlan, adapter: Adapter, vocabulary: Vocabulary) -> Iterator[str]:
    """Yield missing tensors that PEFT would have saved, and duplicates with other values, each with the reason."""
    yield from _missing_weights(plan, adapter)
    yield from _missing_biases(plan, adapter)
    yield from _missing_tokens(adapter, vocabulary)
    yield from _missing_vocabulary(plan, adapter, vocabulary)
    for duplicate, parameter in adapter.tensors.duplicates.items():
        name = adapter.tensors.saved[parameter]
        if not are_equal(lazy_tensor(adapter.weights, duplicate), lazy_tensor(adapter.weights, name)):
            yield f"{duplicate} (its values differ from {name}, which it duplicates)"


def _missing_weights(plan: MergePlan, adapter: Adapter) -> Iterator[str]:
    """Yield the missing tensors that ``modules_to_save`` and ``bias="all"`` save, of the trained parts of the model."""
    settings, config = adapter.settings, plan.base.config
    if not settings.modules_to_save and settings.bias != "all":
        return
    saved = _stored_names(plan, adapter.tensors.saved)
    trained = {parse_name(name, config).part for name, merge in plan.merges.items() if merge.adapter_tensors}
    for name in plan.base:
        module, _, parameter = name.rpartition(".")
        module = module.partition(".experts")[0]
        is_required = settings.saves(module) or (settings.bias == "all" and parameter == "bias")
        if is_required and name not in saved and parse_name(name, config).part in {*trained, *_ALWAYS_LOADED}:
            yield f"{name} (required by the settings, but missing)"


def _missing_biases(plan: MergePlan, adapter: Adapter) -> Iterator[str]:
    if adapter.settings.bias == "lora_only":
        biases = [f"{parameter.removesuffix('.weight')}.bias" for parameter in adapter.tensors.factors]
        for name in sorted(_stored_names(plan, biases) - _stored_names(plan, adapter.tensors.saved)):
            yield f"{name} (required by bias=lora_only, but missing)"


def _missing_tokens(adapter: Adapter, vocabulary: Vocabulary) -> Iterator[str]:
    modules = adapter.tensors.tokens
    present = [adapter.settings.tokens_of(module) for module in modules]
    for name, rows in adapter.settings.trainable_token_indices.items():
        is_shared = vocabulary.tied and rows in present
        if not is_shared and not any(module.endswith(name) for module in modules):
            yield f"{name} (in trainable_token_indices, but its rows are missing)"


def _missing_vocabulary(plan: MergePlan, adapter: Adapter, vocabulary: Vocabulary) -> Iterator[str]:
    """Yield embedding or head if only the other was saved with no setting: PEFT saves both of a resized vocabulary."""
    tensors = adapter.tensors
    implicit = [path for path in tensors.saved if path.endswith(".weight") and not adapter.settings.saves(path[:-7])]
    if implicit:
        modules = (*tensors.copies, *tensors.tokens)
        present = _stored_names(plan, [*tensors.saved, *tensors.factors, *(f"{module}.weight" for module in modules)])
        for name in vocabulary.names:
            if name not in present:
                yield f"{name} (missing, but {tensors.saved[implicit[0]]} is present as part of a resized vocabulary)"


def _stored_names(plan: MergePlan, parameters: Iterable[str]) -> set[str]:
    return {slice_.name for parameter in parameters for slice_ in slices_of(parameter, plan.base)}
