"""What ``adapter_config.json`` says, as far as a merge depends on it; anything else that is set is refused by name."""

import math
import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import FiniteFloat, NonNegativeInt, PositiveInt, TypeAdapter, field_validator
from pydantic.dataclasses import dataclass as validated_dataclass

from qwen_pipeline.errors import AdapterRefused

_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` that leave the base as it was."""

_TRAINING_ONLY = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
    "fan_in_fan_out",
)  # fmt: skip
"""Fields that chose what was trained and how; the saved tensors already show the outcome.

``fan_in_fan_out`` is among them because PEFT turns it off for every ``nn.Linear``, and Qwen models have no other kind.
"""

MERGE_WITH_PEFT = (
    "Merge it with PEFT (PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(...)) and hand in the result"
    " as a full fine-tune."
)
_UNSUPPORTED: Mapping[str, str] = {
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
_OTHER_METHODS: Mapping[str, str] = {
    "XLORA": "X-LoRA mixes adapters anew for each token",
    "PROMPT_TUNING": "prompt tuning adds tokens to the input",
    "MULTITASK_PROMPT_TUNING": "prompt tuning adds tokens to the input",
    "P_TUNING": "P-tuning adds tokens to the input",
    "PREFIX_TUNING": "prefix tuning adds keys and values to the attention",
    "ADAPTION_PROMPT": "an adaption prompt adds keys and values to the attention",
    "CPT": "context-aware prompt tuning adds tokens to the input",
    "CARTRIDGE": "a cartridge adds keys and values to the attention",
}
"""PEFT types whose effect no weight of the base can hold."""

INPUT_EMBEDDING = "embed_tokens"
"""The name that ``trainable_token_indices`` means when it is a list."""
OUTPUT_HEAD = "lm_head"

_INERT: tuple[object, ...] = (None, False, "none", [], {})

_T = TypeVar("_T")


@validated_dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """The settings that decide what the tensors of an adapter amount to; names as PEFT has them."""

    r: PositiveInt
    lora_alpha: FiniteFloat
    use_rslora: bool = False
    rank_pattern: Mapping[str, PositiveInt] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, FiniteFloat] = field(default_factory=dict[str, float])
    use_dora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    trainable_token_indices: Mapping[str, tuple[NonNegativeInt, ...]] = field(
        default_factory=dict[str, tuple[int, ...]]
    )
    ensure_weight_tying: bool = False

    @field_validator("trainable_token_indices", mode="before")
    @classmethod
    def _of_the_input_embedding(cls, value: object) -> object:
        return {INPUT_EMBEDDING: value} if isinstance(value, list) else value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _require_patterns(cls, value: Mapping[str, _T]) -> Mapping[str, _T]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return value

    def rank(self, module: str) -> int:
        """Return the rank of a module; the first pattern that matches decides."""
        return _resolve(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """Return ``alpha / r``, or with rsLoRA ``alpha / sqrt(r)`` (arXiv:2312.03732)."""
        alpha, rank = _resolve(self.alpha_pattern, module, self.lora_alpha), self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def saves(self, module: str) -> bool:
        """Whether ``modules_to_save`` means this module or one around it; PEFT compares the ends of paths."""
        around = [module[: dot.start()] for dot in re.finditer(r"\.", module)]
        return any(path.endswith(self.modules_to_save) for path in (module, *around))

    def targets_parameter(self, parameter: str) -> bool:
        """Whether ``target_parameters`` means this parameter: its whole path, or the end of it after a dot."""
        return any(parameter == target or parameter.endswith(f".{target}") for target in self.target_parameters)

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """Return the trained rows of a module, none if ``trainable_token_indices`` does not name it.

        Where the head is the embedding, only the embedding is named, and its rows are the head's.
        """
        rows = self.trainable_token_indices
        own = next((rows[name] for name in rows if module.endswith(name)), ())
        return own or (self.tokens_of(INPUT_EMBEDDING) if module.endswith(OUTPUT_HEAD) else ())


_LORA_SETTINGS = TypeAdapter(LoraSettings)
_MERGED = {"peft_type", "init_lora_weights", *LoraSettings.__dataclass_fields__}


def lora_settings(config: Mapping[str, Any], *, source: Path) -> LoraSettings:
    """Return the settings of a parsed ``adapter_config.json``; ``source`` is named in messages.

    Raises:
        AdapterRefused: Another method than LoRA, a setting that is not supported or not known, a damaged value.
    """
    _require_lora(config.get("peft_type"), source)
    if (init := config.get("init_lora_weights", True)) not in _PLAIN_INITS:
        raise AdapterRefused(
            f"{source} was initialised with init_lora_weights={init!r}, which changed the base's own weights.",
            remedy="Convert it to plain LoRA where it was trained: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...).",
        )
    for name, value in config.items():
        if name not in _MERGED and name not in _TRAINING_ONLY and value not in _INERT:
            raise _refusal(name, value, source)
    fields = {name: config[name] for name in LoraSettings.__dataclass_fields__ if config.get(name) is not None}
    try:
        return _LORA_SETTINGS.validate_python(fields)
    except ValueError as error:
        raise AdapterRefused(f"A value of {source} is damaged: {error}.", remedy="Save the adapter again.") from error


def _require_lora(kind: object, source: Path) -> None:
    if kind == "LORA":
        return
    if reason := _OTHER_METHODS.get(str(kind)):
        raise AdapterRefused(
            f"{source} is of PEFT type {kind!r}: {reason}, which no merged weight can.",
            remedy="Serve it as an adapter beside the base.",
        )
    raise AdapterRefused(f"{source} is of PEFT type {kind!r}; only LORA is supported.", remedy=MERGE_WITH_PEFT)


def _refusal(name: str, value: object, source: Path) -> AdapterRefused:
    if reason := _UNSUPPORTED.get(name):
        return AdapterRefused(f"{source} has {name}={value!r}: {reason}.", remedy=MERGE_WITH_PEFT)
    if reason := _UNMERGEABLE.get(name):
        return AdapterRefused(
            f"{source} has {name}={value!r}: {reason}, which no merged weight can.",
            remedy="Serve it as an adapter beside the base.",
        )
    return AdapterRefused(
        f"{source} has {name}={value!r}, a setting that this version does not know.",
        remedy=f"If it only steered the training, remove it from the file. Otherwise: {MERGE_WITH_PEFT}",
    )


def _resolve(patterns: Mapping[str, _T], module: str, default: _T) -> _T:
    """Return the value of the first pattern that matches the whole path or its end after a dot (PEFT's rule)."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
