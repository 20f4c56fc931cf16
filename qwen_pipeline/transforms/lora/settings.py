"""The settings of ``adapter_config.json`` that a merge depends on; any other setting in use is refused by name."""

import math
import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError, field_validator
from pydantic.dataclasses import dataclass as validated_dataclass

from qwen_pipeline.errors import AdapterRefused, listed
from qwen_pipeline.qwen.patterns import compile_pattern

_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` that do not change the base's weights."""

_TRAINING_ONLY = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
    "fan_in_fan_out", "lora_B_layout", "unsloth_fused_expert_lora",
)  # fmt: skip
"""Settings that matter in training only; their effect is already in the saved tensors.

The last two are Unsloth's, and state the order of their columns (:mod:`qwen_pipeline.transforms.lora.saved.experts`).

``fan_in_fan_out`` is one of them because PEFT turns it off for every ``nn.Linear``, and Qwen models use no other kind.
"""

MERGE_WITH_PEFT = (
    "Merge it with PEFT (PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(...)) and use the result"
    " as a full fine-tune."
)
_SERVE_AS_ADAPTER = "Serve it as an adapter on top of the base, without merging."
_UNSUPPORTED: Mapping[str, str] = {
    "megatron_config": "Megatron sharded its modules",
    "use_bdlora": "its factors are block diagonal",
    "kasa_config": "KaSA truncates the base's weights and puts a diagonal matrix between the factors",
    "velora_config": "merging VeLoRA has not been verified",
    "monteclora_config": "MonteCLoRA samples its factors",
}
_UNMERGEABLE: Mapping[str, str] = {
    "alora_invocation_tokens": "an activated LoRA applies to some of the tokens only",
    "arrow_config": "Arrow chooses other factors for each token",
    "use_qalora": "QA-LoRA pools the inputs of its factors, which PEFT cannot merge either",
    "layer_replication": "the model that it was trained on has more layers than its base",
}
_OTHER_METHODS: Mapping[str, str] = {
    "XLORA": "X-LoRA mixes adapters differently for each token",
    "PROMPT_TUNING": "prompt tuning adds tokens to the input",
    "MULTITASK_PROMPT_TUNING": "prompt tuning adds tokens to the input",
    "P_TUNING": "P-tuning adds tokens to the input",
    "PREFIX_TUNING": "prefix tuning adds keys and values to the attention",
    "ADAPTION_PROMPT": "an adaption prompt adds keys and values to the attention",
    "CPT": "context-aware prompt tuning adds tokens to the input",
    "CARTRIDGE": "a cartridge adds keys and values to the attention",
}
"""PEFT types whose effect cannot be expressed as a change of the base's weights, each with the reason."""

INPUT_EMBEDDING = "embed_tokens"
"""The module that ``trainable_token_indices`` refers to if it is a list."""
OUTPUT_HEAD = "lm_head"

_UNSET: tuple[object, ...] = (None, False, "none", [], {})

_T = TypeVar("_T")
Rank = Annotated[int, Field(strict=True, ge=1, le=2**20)]
Alpha = Literal[0] | Annotated[float, Field(strict=True, ge=1e-6, le=1e6)]
"""A negative alpha is a slip: an adapter is subtracted by a negative weight. One of 0 fails `changes_the_base`."""
Row = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
_WHOLE_OR_END = r"(.*\.)?({})$"
"""The paths that a pattern of PEFT stands for: those that match it, and those that end so after a dot."""


@validated_dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """The settings that determine the effect of an adapter's tensors, under PEFT's names."""

    r: Rank
    lora_alpha: Alpha
    use_rslora: bool = False
    rank_pattern: Mapping[str, Rank] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, Alpha] = field(default_factory=dict[str, float])
    use_dora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    trainable_token_indices: Mapping[str, tuple[Row, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    ensure_weight_tying: bool = False

    @field_validator("trainable_token_indices", mode="before")
    @classmethod
    def _of_the_input_embedding(cls, value: object) -> object:
        return {INPUT_EMBEDDING: value} if isinstance(value, list) else value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _require_patterns(cls, value: Mapping[str, _T]) -> Mapping[str, _T]:
        for pattern in value:
            compile_pattern(pattern, around=_WHOLE_OR_END)
        return value

    def rank(self, module: str) -> int:
        """Return the rank of a module: that of the first matching pattern, else ``r``."""
        return _resolve(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """Return ``alpha / r``, or with rsLoRA ``alpha / sqrt(r)`` (arXiv:2312.03732)."""
        alpha, rank = _resolve(self.alpha_pattern, module, self.lora_alpha), self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def saves(self, module: str) -> bool:
        """Return whether ``modules_to_save`` names this module or a parent of it; PEFT compares the ends of paths."""
        parents = [module[: dot.start()] for dot in re.finditer(r"\.", module)]
        return any(path.endswith(self.modules_to_save) for path in (module, *parents))

    def targets_parameter(self, parameter: str) -> bool:
        """Return whether ``target_parameters`` names this parameter by its whole path, or its end after a dot."""
        return any(parameter == target or parameter.endswith(f".{target}") for target in self.target_parameters)

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """Return the trained rows of a module; none if ``trainable_token_indices`` does not name it.

        If embedding and head are tied, only the embedding is named, and its rows are the head's as well.
        """
        rows = self.trainable_token_indices
        named = next((rows[name] for name in rows if module.endswith(name)), ())
        return named or (self.tokens_of(INPUT_EMBEDDING) if module.endswith(OUTPUT_HEAD) else ())


_TEXTS = ("base_model_name_or_path", "revision", "peft_version")
_MAX_TEXT = 1000
_LORA_SETTINGS = TypeAdapter(LoraSettings)
_MERGED = {"peft_type", "init_lora_weights", *LoraSettings.__dataclass_fields__}


def lora_settings(config: Mapping[str, Any], *, source: Path) -> LoraSettings:
    """Return the settings of a parsed ``adapter_config.json``; ``source`` is its path, for messages.

    Raises:
        AdapterRefused: The method is not LoRA, a setting is unsupported or unknown, or a value is invalid.
    """
    _require_lora(config.get("peft_type"), source)
    for name in _TEXTS:
        text = config.get(name) or ""
        if not isinstance(text, str) or len(text) > _MAX_TEXT or not text.isprintable():
            raise AdapterRefused(
                f"{source} has {name}={ascii(text)[:80]}, expected a text of up to {_MAX_TEXT} printable characters.",
                remedy=f"Correct {name} in the file.",
            )
    if (init := config.get("init_lora_weights", True)) not in _PLAIN_INITS:
        raise AdapterRefused(
            f"{source} has init_lora_weights={init!r}, which can change the base's weights before training; expected"
            f" one of {', '.join(map(repr, _PLAIN_INITS))}.",
            remedy="Convert it to a plain LoRA where it was trained: save_pretrained(...,"
            " path_initial_model_for_weight_conversion=PATH), where PATH is the adapter saved before training.",
        )
    for name, value in config.items():
        if name not in _MERGED and name not in _TRAINING_ONLY and value not in _UNSET:
            raise _refusal(name, value, source)
    fields = {name: config[name] for name in LoraSettings.__dataclass_fields__ if config.get(name) is not None}
    try:
        return _LORA_SETTINGS.validate_python(fields)
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, each['loc']))} is {ascii(each['input'])[:60]}: {each['msg']}"
            for each in error.errors()
        ]
        raise AdapterRefused(
            f"{source} has invalid values: {listed(wrong)}.",
            remedy="Use the adapter_config.json that PEFT saved with the weights, or save the adapter again.",
        ) from error


def _require_lora(peft_type: object, source: Path) -> None:
    if peft_type == "LORA":
        return
    if reason := _OTHER_METHODS.get(str(peft_type)):
        raise AdapterRefused(
            f"{source} has the PEFT type {peft_type!r}, which cannot be merged: {reason}.", remedy=_SERVE_AS_ADAPTER
        )
    raise AdapterRefused(f"{source} has the PEFT type {peft_type!r}, expected 'LORA'.", remedy=MERGE_WITH_PEFT)


def _refusal(name: str, value: object, source: Path) -> AdapterRefused:
    if reason := _UNSUPPORTED.get(name):
        return AdapterRefused(
            f"{source} has {name}={value!r}, which is not supported here: {reason}.", remedy=MERGE_WITH_PEFT
        )
    if reason := _UNMERGEABLE.get(name):
        return AdapterRefused(
            f"{source} has {name}={value!r}, which cannot be merged: {reason}.", remedy=_SERVE_AS_ADAPTER
        )
    return AdapterRefused(
        f"{source} has {name}={value!r}, a setting that this version does not support.",
        remedy=f"If it affected the training only, remove it from the file. Otherwise: {MERGE_WITH_PEFT}",
    )


def _resolve(patterns: Mapping[str, _T], module: str, default: _T) -> _T:
    """Return the value of the first pattern that matches the whole path, or its end after a dot, as PEFT does."""
    found = (value for key, value in patterns.items() if compile_pattern(key, around=_WHOLE_OR_END).match(module))
    return next(found, default)
