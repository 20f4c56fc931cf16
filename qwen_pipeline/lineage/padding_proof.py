"""Proof that a padding map is of a padded checkpoint: undoing the padding gives the digest of what was padded.

No digest covers the map, which is in the manifest's ``result``. But padding is undone bit for bit, so a map that gives
back the input's content digest is the map, and the padded weights are that input's.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qwen_pipeline.checkpoint.digest import digest_files, hash_tensors
from qwen_pipeline.checkpoint.lazy import CONFIG
from qwen_pipeline.checkpoint.manifest import Contents, FileDigest
from qwen_pipeline.errors import PipelineError
from qwen_pipeline.lineage.verification.findings import Finding
from qwen_pipeline.lineage.verification.order import short
from qwen_pipeline.lineage.verification.records import Record
from qwen_pipeline.models.open import open_model
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.qwen.geometry import load_plan
from qwen_pipeline.transforms.codes.base_weights import AS_STORED, base_weights
from qwen_pipeline.transforms.padding.pad import unpad

NAME = "padding_map_of_padded"


def prove_padding_map(record: Record, *, observe: Observe = unobserved) -> Finding:
    """Undo the padding of a checkpoint whose bytes are proven, and compare the content digest with its input's."""
    expected = record.step.inputs.get("source")
    if obstacle := _obstacle(record, expected):
        return Finding(name=NAME, verdict="claimed", detail=obstacle)
    try:
        found = _unpadded_digest(record, observe)
    except (PipelineError, KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        return Finding(name=NAME, verdict="refuted", detail=f"The padding map does not fit the weights: {error}.")
    if found != expected:
        detail = f"Undoing the padding by its map gives {found}, but {expected} was padded."
        return Finding(name=NAME, verdict="refuted", detail=detail)
    return Finding(
        name=NAME, verdict="proven", detail=f"Undoing the padding by its map gives {short(found)}, its input."
    )


def _obstacle(record: Record, expected: str | None) -> str:
    result = record.result
    if expected is None or "live_config" not in result or "padding" not in result:
        return "It was made by merging into a padded base, or records no map, so there is no digest to compare with."
    if result.get("left_behind"):
        return "Padding left buffers behind that are no weights, so undoing it gives another digest."
    if result.get("split"):
        return "Padding split fused matrices, so undoing it gives another digest."
    if base_weights(record.step.spec) != AS_STORED:
        return "What was padded is the full precision of a quantized checkpoint, which was never stored."
    return ""


def _unpadded_digest(record: Record, observe: Observe) -> str:
    padded, result = open_model(record.root), record.result
    live = unpad(padded, load_plan(_mapping(result["padding"])))
    text = result["live_config"]
    files = digest_files(live.sidecars)
    config = digest_files({CONFIG: record.root / CONFIG})[CONFIG]
    if text:
        live = replace(live, config_bytes=text.encode())
        config = _digest_of(text.encode())
    tensors = hash_tensors(live.tensors, task="undo padding", observe=observe)
    digests = {name: tensor.digest for name, tensor in tensors.items()}
    return Contents(tensors=digests, files={CONFIG: config, **files}).digest


def _digest_of(data: bytes) -> FileDigest:
    return FileDigest(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"it is {type(value).__name__}, not a mapping")
    return value  # pyright: ignore[reportUnknownVariableType]
