"""Values of configs by path, the refusal of quantized weights, and the tokens that end generation."""

from collections.abc import Mapping
from typing import Any, cast

from qwen_pipeline.checkpoint.files import load_json
from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import QuantizedInputRefused
from qwen_pipeline.qwen.families import config_items, text_config
from qwen_pipeline.qwen.names import FUSED

_PACKED = ("qweight", "qzeros", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv", "absmax", "quant_map")
_FULL = ("BF16", "F16", "F32", "F64")
REMOVED = object()
"""Stands for the value of a field that is removed from a config."""


FULL_PRECISION_BASE = (
    "Use the full-precision base; quantize after merging (merge, then pad, then quantize). If there is none, read its"
    " codes as the full precision that they stand for: --base-dequantize, or base_dequantize in the settings."
)
"""The remedy for a quantized base."""


def flat_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a config's values by path, such as ``text_config.intermediate_size``."""
    flat: dict[str, Any] = {}
    for field, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flat_config(cast("Mapping[str, Any]", value), f"{prefix}{field}.")
        else:
            flat[prefix + field] = value
    return flat


def diff_configs(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that differ between two configs: path -> value in ``after``, None if it is absent there."""
    old, new = flat_config(before), flat_config(after)
    return {path: new.get(path) for path in new | old if old.get(path) != new.get(path)}


def with_values(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with values replaced or added: path -> value, :data:`REMOVED` for a field that it drops."""
    changed = dict(config)
    for path, value in values.items():
        field, _, rest = path.partition(".")
        if rest:
            changed[field] = with_values(changed.get(field) or {}, {rest: value})
        elif value is REMOVED:
            changed.pop(field, None)
        else:
            changed[field] = value
    return changed


def require_full_precision(checkpoint: Checkpoint, *, because: str, remedy: str) -> None:
    """Refuse quantized weights, recognized by the tensors: a config may keep the settings of a training or of a base.

    Raises:
        QuantizedInputRefused: A weight is quantized. The message has the evidence, ``because`` and ``remedy``.
    """
    if found := _quantization(checkpoint):
        raise QuantizedInputRefused(f"The weights are quantized ({found}). {because}", remedy=remedy)


def _quantization(checkpoint: Checkpoint) -> str | None:
    for name, spec in checkpoint.items():
        is_weight = name.endswith((".weight", *FUSED))
        if name.rpartition(".")[2] in _PACKED or (is_weight and spec.dtype not in _FULL):
            declared = [f"{path}: {_method(value)}" for path, value in quantization_settings(checkpoint.config).items()]
            return "; ".join([f"tensor {name}, {spec.dtype} {list(spec.shape)}", *declared])
    return None


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Return whether a weight is stored as codes, or in a dtype that needs scales."""
    return _quantization(checkpoint) is not None


def quantization_settings(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return each path of a config that declares quantized weights, with the settings there."""
    return {
        path: cast("Mapping[str, Any]", value)
        for field in ("quantization_config", "compression_config")
        for path, value in config_items(config, field).items()
        if isinstance(value, Mapping)
    }


def _method(settings: Mapping[str, Any]) -> str:
    bits = settings.get("bits")
    return str(settings.get("quant_method", "unknown method")) + (f", {bits} bit" if bits else "")


GENERATION_CONFIG = "generation_config.json"


def stop_tokens(checkpoint: Checkpoint) -> frozenset[int]:
    """Return the ``eos_token_id`` of ``generation_config.json``, one or several; without the file, of ``config.json``.

    A generation config without the field has no stop tokens, even if ``config.json`` has some.
    """
    if file := checkpoint.sidecars.get(GENERATION_CONFIG):
        ids = load_json(file).get("eos_token_id")
    else:
        ids = checkpoint.config.get("eos_token_id", text_config(checkpoint.config).get("eos_token_id"))
    return frozenset([] if ids is None else [ids] if isinstance(ids, int) else ids)
