"""Checks of a model's configs: full-precision weights, and the tokens that end generation."""

import json
from collections.abc import Mapping
from typing import Any, cast

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import QuantizedInputRefused
from qwen_pipeline.qwen.families import text_config

_PACKED = ("qweight", "qzeros", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv", "absmax", "quant_map")
_FULL = ("BF16", "F16", "F32", "F64")


def require_full_precision(checkpoint: Checkpoint, *, because: str, remedy: str) -> None:
    """Refuse quantized weights, recognized by the config or by the tensors.

    Raises:
        QuantizedInputRefused: The weights are quantized. The message has the evidence, ``because`` and ``remedy``.
    """
    if found := _quantization(checkpoint):
        raise QuantizedInputRefused(f"The weights are quantized ({found}). {because}", remedy=remedy)


def _quantization(checkpoint: Checkpoint) -> str | None:
    for config in (checkpoint.config, text_config(checkpoint.config)):
        for field in ("quantization_config", "compression_config"):
            if isinstance(settings := config.get(field), Mapping):
                return f"{field} of the config: {_method(cast('Mapping[str, Any]', settings))}"
    for name, spec in checkpoint.items():
        if name.rpartition(".")[2] in _PACKED or (name.endswith(".weight") and spec.dtype not in _FULL):
            return f"tensor {name}, {spec.dtype} {list(spec.shape)}"
    return None


def _method(settings: Mapping[str, Any]) -> str:
    bits = settings.get("bits")
    return str(settings.get("quant_method", "unknown method")) + (f", {bits} bit" if bits else "")


GENERATION_CONFIG = "generation_config.json"


def stop_tokens(checkpoint: Checkpoint) -> frozenset[int]:
    """Return the ``eos_token_id`` of ``generation_config.json``, one or several; without the file, of ``config.json``.

    A generation config without the field has no stop tokens, even if ``config.json`` has some.
    """
    if file := checkpoint.sidecars.get(GENERATION_CONFIG):
        ids = json.loads(file.read_text()).get("eos_token_id")
    else:
        ids = checkpoint.config.get("eos_token_id", text_config(checkpoint.config).get("eos_token_id"))
    return frozenset([] if ids is None else [ids] if isinstance(ids, int) else ids)
