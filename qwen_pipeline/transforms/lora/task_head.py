"""The head that adapters were trained with, where it is another than the base's.

PEFT adds adapters to the model that Transformers loads for the task. For a classifier or reward model it has a new
``score``, which the adapter saves whole, and no output head; for an embedding model it has no head at all.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qwen_pipeline.checkpoint.files import load_json
from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.errors import AdapterRefused, CheckpointRefused
from qwen_pipeline.qwen.config import with_values
from qwen_pipeline.qwen.families import FAMILIES, Family, text_config, text_prefix
from qwen_pipeline.qwen.heads import SCORE_BIAS, SCORE_WEIGHT, architectures_of, head_kind, label_fields, with_prefix
from qwen_pipeline.qwen.names import parse_name
from qwen_pipeline.transforms.lora.adapter import Adapter
from qwen_pipeline.transforms.lora.adapter_set import AdapterSet
from qwen_pipeline.transforms.lora.lazy_ops import cast, lazy_tensor
from qwen_pipeline.transforms.lora.vocabulary import embedding_name

_CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS")
_EMBEDDERS = ("FEATURE_EXTRACTION",)
_TOKENIZER_CONFIG, _GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
_LABELS = ("id2label", "label2id", "problem_type", "pad_token_id")
"""Fields that a config beside an adapter may give to the merged model's."""


def with_task_head(base: Checkpoint, adapters: AdapterSet) -> Checkpoint:
    """Return the base with the head of the model that the adapters were trained on, which may be the base's own.

    Raises:
        AdapterRefused: The adapters' task needs a ``score`` that neither they nor the base have, or the base's family
            has no class for the task.
    """
    saved = {
        path: (adapter, name)
        for adapter in adapters.adapters
        for path, name in adapter.tensors.saved.items()
        if path in (SCORE_WEIGHT, SCORE_BIAS)
    }
    tasks = {str(adapter.config.get("task_type")) for adapter in adapters.adapters}
    if saved or tasks & {*_CLASSIFIERS}:
        _require_scored(base, adapters)
    if saved:
        return _scored(base, adapters, saved)
    if tasks & {*_CLASSIFIERS} and head_kind(base) not in ("sequence", "token"):
        raise AdapterRefused(
            f"An adapter was trained for {', '.join(sorted(tasks))}, but neither it nor the base has {SCORE_WEIGHT}.",
            remedy="Provide the adapter as PEFT saved it, with modules_to_save: the head is a part of it.",
        )
    return _without_head(base) if tasks & {*_EMBEDDERS} else base


def _require_scored(base: Checkpoint, adapters: AdapterSet) -> None:
    family = FAMILIES.get(str(base.config.get("model_type")), Family())
    if not family.scored:
        supported = ", ".join(name for name, each in FAMILIES.items() if each.scored)
        raise AdapterRefused(
            f"{adapters.adapters[0].root} was trained for {adapters.adapters[0].config.get('task_type')}, which is not"
            f" supported for models of type {base.config.get('model_type')}.",
            remedy=f"Classifiers and reward models are supported for {supported}.",
        )


def _scored(base: Checkpoint, adapters: AdapterSet, saved: Mapping[str, tuple[Adapter, str]]) -> Checkpoint:
    """Return the base with the adapters' ``score`` instead of its heads, in the dtype of its embedding or ``score``."""
    names = [name for name in base if _is_head(base, name)]
    others = base.without(names) if names else base
    last = list(others)[-1]
    dtype = base[SCORE_WEIGHT if SCORE_WEIGHT in base else embedding_name(base)].dtype
    for path in sorted(saved):  # the bias first, so that it ends up after the weight
        adapter, name = saved[path]
        tensor: LazyTensor = cast(lazy_tensor(adapter.weights, name), dtype)
        others = others.with_tensor(path, tensor, after=last)
    if SCORE_WEIGHT not in others:
        raise AdapterRefused(
            f"{adapters.adapters[0].root} has {SCORE_BIAS} without {SCORE_WEIGHT}.",
            remedy="Provide all files that PEFT saved.",
        )
    return with_prefix(replace(others, config=_scored_config(base, others, adapters), config_bytes=None))


def _scored_config(base: Checkpoint, scored: Checkpoint, adapters: AdapterSet) -> dict[str, Any]:
    """Return the base's config with class, labels and pad token; the adapter may bring the names of the labels."""
    beside = {name: value for name, value in adapters.adapters[-1].labels.items() if name in _LABELS}
    kind = head_kind(scored)
    labels = scored[SCORE_WEIGHT].rows
    values = {**beside, **label_fields(labels, beside if "id2label" in beside else base.config)}
    values["architectures"] = list(architectures_of(kind, base.config)[:1])
    pad = values.pop("pad_token_id", text_config(base.config).get("pad_token_id"))
    values[text_prefix(base.config) + "pad_token_id"] = pad if pad is not None else _pad_token(base, adapters)
    return with_values(base.config, {name: value for name, value in values.items() if value is not None})


def _pad_token(base: Checkpoint, adapters: AdapterSet) -> int | None:
    """Return the pad token of the tokenizer, without which Transformers classifies only one text at a time."""
    for sidecars in (adapters.sidecars, base.sidecars):
        if file := sidecars.get(_TOKENIZER_CONFIG):
            tokenizer = load_json(file)
            token = tokenizer.get("pad_token")
            text = token.get("content") if isinstance(token, Mapping) else token
            for number, added in (tokenizer.get("added_tokens_decoder") or {}).items():
                if text is not None and added.get("content") == text:
                    return int(number)
    if file := base.sidecars.get(_GENERATION_CONFIG):
        number = load_json(file).get("pad_token_id")
        return number if isinstance(number, int) else None
    return None


def _without_head(base: Checkpoint) -> Checkpoint:
    """Return a language model without its output head; models of families without such a class stay as they are."""
    if head_kind(base) != "language" or not FAMILIES[base.config["model_type"]].scored:
        return base
    names = [name for name in base if _is_head(base, name)]
    config = with_values(base.config, {"architectures": list(architectures_of("embedding", base.config)[:1])})
    return (base.without(names) if names else base).replace(config=config)


def _is_head(base: Checkpoint, name: str) -> bool:
    """Return whether a tensor belongs to an output head or to a draft head."""
    try:
        return parse_name(name, base.config).part in ("head", "mtp")
    except CheckpointRefused:
        return False
