"""Finished layers of the layer loop on disk: a shard of codes each, followed by a record of its figures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save
from torch import Tensor

from qwen_pipeline.checkpoint.digest import digest_file
from qwen_pipeline.checkpoint.lazy import CONFIG, INDEX
from qwen_pipeline.checkpoint.safetensors_file import open_safetensors
from qwen_pipeline.checkpoint.writer import write_bytes
from qwen_pipeline.quantization.evidence import ModuleEvidence
from qwen_pipeline.quantization.job import record_of, shard_of
from qwen_pipeline.quantization.losses import LOG_COLUMNS, log_row
from qwen_pipeline.quantization.spec import QuantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """Figures of a finished layer, written once its shard is on disk.

    Attributes:
        sha256: Digest of the shard.
        modules: Rows of the solver's log.
        seconds: Duration of ``load`` (reading the weights), ``capture`` (inputs and Hessians), ``solve``, and
            ``forward`` (the complete passes that compute the inputs of the next layer); and ``learn``, if rounding is
            learned.
        errors: For a recipe that compares models, the squared error of the quantized layer's outputs as a share of the
            full-precision model's: ``output``, and ``before_learning``; ``travel`` is how far learned offsets could go.
    """

    sha256: str
    modules: tuple[dict[str, Any], ...]
    seconds: Mapping[str, float]
    peak_gpu_bytes: int
    errors: Mapping[str, float] = field(default_factory=dict[str, float])

    def to_json(self) -> dict[str, Any]:
        """Return the figures of the layer; errors are left out if there are none."""
        figures: dict[str, Any] = {"seconds": dict(self.seconds), "peak_gpu_bytes": self.peak_gpu_bytes}
        return {**figures, "errors": dict(self.errors)} if self.errors else figures


_RECORD = TypeAdapter(LayerRecord)


def write_layer(
    out: Path,
    layer: int,
    tensors: Mapping[str, Tensor],
    rows: Sequence[ModuleEvidence],
    seconds: Mapping[str, float],
    errors: Mapping[str, float],
) -> LayerRecord:
    """Write the codes of a layer and, once they are on disk, their record."""
    write_bytes(shard_of(out, layer), save({name: tensor.cpu() for name, tensor in tensors.items()}))
    record = LayerRecord(
        sha256=digest_file(shard_of(out, layer)).sha256,
        modules=tuple(map(log_row, rows)),
        seconds={part: round(value, 3) for part, value in seconds.items()},
        peak_gpu_bytes=(rows[-1].gpu_peak_bytes or 0) if rows else 0,
        errors=errors,
    )
    write_bytes(record_of(out, layer), _RECORD.dump_json(record))
    return record


def finished_layers(out: Path, layers: int) -> list[LayerRecord]:
    """Return the records of the first layers, up to the first whose shard is missing or differs from its record."""
    records: list[LayerRecord] = []
    for layer in range(layers):
        shard = shard_of(out, layer)
        if not shard.with_suffix(".json").is_file() or not shard.is_file():
            break
        try:
            record = _RECORD.validate_json(shard.with_suffix(".json").read_bytes())
        except ValidationError:
            break
        if any(tuple(row) != LOG_COLUMNS for row in record.modules):
            break  # written by another version: the layer is quantized again
        if digest_file(shard).sha256 != record.sha256:
            break
        records.append(record)
    return records


def write_index(out: Path, layers: int, spec: QuantSpec) -> None:
    """Write the index and the config with which the first layers can be opened as a checkpoint."""
    shards = [shard_of(out, layer) for layer in range(layers)]
    owners = {name: shard.name for shard in shards for name in open_safetensors(shard).specs}
    write_bytes(out / INDEX, json.dumps({"weight_map": owners}).encode())
    config = {"quantization_config": spec.quantization_config("layerwise")}
    write_bytes(out / CONFIG, json.dumps(config).encode())
