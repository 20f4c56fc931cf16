"""What ``adapter_config.json`` says, as far as a merge depends on it; anything else that is set is refused by name."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import FiniteFloat, PositiveInt, TypeAdapter

from qwen_pipeline.errors import AdapterRefused

_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` that leave the base as it was."""

_MERGED = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights")
_TRAINING_ONLY = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
)  # fmt: skip
"""Fields that chose what was trained and how; the saved tensors already show the outcome."""

MERGE_WITH_PEFT = (
    "Merge it with PEFT (PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(...)) and hand in the result"
    " as a full fine-tune."
)
_UNSUPPORTED: Mapping[str, str] = {
    "use_dora": "DoRA rescales the columns of the merged weight",
    "modules_to_save": "whole modules were trained beside the low-rank factors",
    "trainable_token_indices": "rows of the embedding were trained",
    "target_parameters": "it updates fused parameters, as of experts",
    "bias": "biases of the base were trained",
    "lora_bias": "its factors carry biases",
    "fan_in_fan_out": "it is meant for transposed weights, which Qwen models do not have",
    "ensure_weight_tying": "it ties factors of the embedding and of lm_head",
    "megatron_config": "its modules are sharded by Megatron",
    "use_qalora": "QA-LoRA pools the inputs of its factors",
    "layer_replication": "the model it was trained on repeats layers",
    "use_bdlora": "its factors are block diagonal",
    "kasa_config": "KaSA truncated the base and puts a diagonal between the factors",
    "velora_config": "VeLoRA is not verified here",
    "monteclora_config": "MonteCLoRA samples its factors",
}
_UNMERGEABLE: Mapping[str, str] = {
    "alora_invocation_tokens": "an activated LoRA works on some of the tokens only",
    "arrow_config": "Arrow routes each token to other factors",
}
_INERT: tuple[object, ...] = (None, False, "none", [], {})

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """The settings that decide what the factors of a module amount to."""

    r: PositiveInt
    lora_alpha: FiniteFloat
    use_rslora: bool = False
    rank_pattern: Mapping[str, PositiveInt] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, FiniteFloat] = field(default_factory=dict[str, float])

    def rank(self, module: str) -> int:
        """Return the rank of a module; the first pattern that matches decides."""
        return _resolve(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """Return ``alpha / r``, or with rsLoRA ``alpha / sqrt(r)`` (arXiv:2312.03732)."""
        alpha, rank = _resolve(self.alpha_pattern, module, self.lora_alpha), self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


_LORA_SETTINGS = TypeAdapter(LoraSettings)


def lora_settings(config: Mapping[str, Any], *, source: Path) -> LoraSettings:
    """Return the settings of a parsed ``adapter_config.json``; ``source`` is named in messages.

    Raises:
        AdapterRefused: Another method than LoRA, a setting that is not supported or not known, a damaged value.
    """
    if (kind := config.get("peft_type")) != "LORA":
        raise AdapterRefused(f"{source} is of PEFT type {kind!r}; only LORA is supported.", remedy=MERGE_WITH_PEFT)
    if (init := config.get("init_lora_weights", True)) not in _PLAIN_INITS:
        raise AdapterRefused(
            f"{source} was initialised with init_lora_weights={init!r}, which changed the base's own weights.",
            remedy="Convert it to plain LoRA where it was trained: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...).",
        )
    for name, value in config.items():
        if name in _MERGED or name in _TRAINING_ONLY or value in _INERT:
            continue
        if reason := _UNSUPPORTED.get(name):
            raise AdapterRefused(f"{source} has {name}={value!r}: {reason}.", remedy=MERGE_WITH_PEFT)
        if reason := _UNMERGEABLE.get(name):
            raise AdapterRefused(
                f"{source} has {name}={value!r}: {reason}, which no merged weight can.",
                remedy="Serve it as an adapter beside the base.",
            )
        raise AdapterRefused(
            f"{source} has {name}={value!r}, a setting that this version does not know.",
            remedy=f"If it only steered the training, remove it from the file. Otherwise: {MERGE_WITH_PEFT}",
        )
    return _numbers(config, source)


def _numbers(config: Mapping[str, Any], source: Path) -> LoraSettings:
    fields = {name: config[name] for name in LoraSettings.__dataclass_fields__ if config.get(name) is not None}
    try:
        settings = _LORA_SETTINGS.validate_python(fields)
        for pattern in (*settings.rank_pattern, *settings.alpha_pattern):
            re.compile(pattern)
    except (ValueError, re.error) as error:
        raise AdapterRefused(
            f"The numbers or patterns of {source} are damaged: {error}.", remedy="Save the adapter again."
        ) from error
    return settings


def _resolve(patterns: Mapping[str, _T], module: str, default: _T) -> _T:
    """Return the value of the first pattern that matches the whole path or its end after a dot (PEFT's rule)."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
