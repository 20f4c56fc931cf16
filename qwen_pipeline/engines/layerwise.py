"""A layer loop of our own over GPTQModel's solver: one decoder layer in memory, each finished one on disk.

A layer is quantized in four steps, in the order in which its linear layers compute; those of one step share their
inputs and so their Hessian. The inputs of a step are taken from a forward pass that ends there, with the steps before
it already quantized. One whole pass then tells the next layer what the quantized layer makes of its inputs. In products
that is about two forward passes a layer.

A finished layer is a shard, and a row of figures written after it. An interrupted run takes finished layers from there.
"""

import csv
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors.torch import save
from torch import Tensor, nn

from qwen_pipeline.checkpoint.digest import block_ranges, digest_file
from qwen_pipeline.checkpoint.lazy import CONFIG, INDEX, Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec, open_safetensors
from qwen_pipeline.checkpoint.writer import write_bytes
from qwen_pipeline.engines.protocol import QuantJob, QuantSpec, require_device
from qwen_pipeline.engines.solver import Hessian, Solved, solve
from qwen_pipeline.errors import InputRefused, listed
from qwen_pipeline.layerwise.forward import Passage, Place
from qwen_pipeline.layerwise.weights import Weights, ahead
from qwen_pipeline.progress import Observe, Progress
from qwen_pipeline.qwen.linears import Linear, decoder_linears
from qwen_pipeline.transforms.gptq_codes import CODES
from qwen_pipeline.transforms.packed import quantized_checkpoint

STEPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Linear layers that are quantized together: each step's share one input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRow:
    """What is known of one module: a row of the log, ``time`` in seconds."""

    layer: int
    module: str
    loss: float
    samples: int
    damp: float
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """A finished layer: its shard's digest, its modules, and what it took; written once the shard is on disk."""

    sha256: str
    modules: tuple[ModuleRow, ...]
    seconds: float
    peak_gpu_bytes: int


_RECORD = TypeAdapter(LayerRecord)


def quantize_directory(spec: Mapping[str, Any], observe: Observe) -> Mapping[str, Any]:
    """Quantize ``job.source`` with ``job.windows`` into ``job.packed``, after the layers that are there already.

    Returns:
        ``layers``: seconds and highest GPU memory of each.

    Raises:
        EnvironmentFault: The spec wants CUDA and there is none.
        CheckFailed: A module's loss is NaN.
    """
    job = QuantJob.from_json(spec)
    require_device(job.spec)
    torch.set_num_threads(job.spec.threads)
    job.packed.mkdir(parents=True, exist_ok=True)
    windows = torch.tensor(np.load(job.windows)).long().split(job.spec.batch_size)
    records = quantize_layers(open_checkpoint(job.source), windows, job.spec, job.packed, observe)
    with job.quant_log.open("w", newline="") as file:
        table = csv.DictWriter(file, ["layer", "module", "loss", "samples", "damp", "time"])
        table.writeheader()
        table.writerows(asdict(row) for record in records for row in record.modules)
    return {"layers": [{"seconds": each.seconds, "peak_gpu_bytes": each.peak_gpu_bytes} for each in records]}


@torch.inference_mode()
def quantize_layers(
    source: Checkpoint, windows: Sequence[Tensor], spec: QuantSpec, out: Path, observe: Observe
) -> list[LayerRecord]:
    """Write each layer's codes into ``out`` as a shard, keeping those that are there; return the layers' records."""
    linears = decoder_linears(source)
    by_layer = [list(group) for _, group in groupby(linears, key=lambda linear: linear.layer)]
    if other := {linear.kind for linear in linears} - {kind for step in STEPS for kind in step}:
        raise InputRefused(
            f"The layer loop quantizes dense decoders only; this one has {listed(sorted(other))}.",
            remedy="Use the engine gptqmodel.",
        )
    dtype = torch.float32 if spec.device == "cpu" else source[f"{linears[0].module}.weight"].torch_dtype
    place = Place(device=torch.device(spec.device), dtype=dtype)
    passage = Passage(source, [batch.to(place.device) for batch in windows], place)
    records = finished_layers(out, len(by_layer))
    done = len(records)
    _write_index(out, done, spec)
    if done:
        packed = quantized_checkpoint(source, open_checkpoint(out), linears, spec.quantization_config("layerwise"))
        weights = Weights(checkpoint=packed, prefix=passage.weights.prefix)
        passage.parts[:done] = [weights.part(f"layers.{n}", passage.skeleton.layers[n]) for n in range(done)]

    modules = ahead([(partial(passage.read, n), partial(passage.build, n)) for n in range(len(by_layer))])
    with ThreadPoolExecutor(1) as disk:
        for layer in range(done):
            passage.run(layer, next(modules))
        writing: Future[LayerRecord] | None = None
        for layer in range(done, len(by_layer)):
            clock = _Clock(place)
            module = next(modules)

            def tell(row: ModuleRow) -> None:
                remark = f"layers.{row.layer}.{row.module} loss {row.loss:.10f}"
                task = Progress(task="quantize", done=row.layer, total=len(by_layer), unit="layers", remark=remark)
                observe(task)

            tensors, rows = _quantize_layer(passage, module, by_layer[layer], spec, tell)
            passage.run(layer, module)
            del module
            records += [writing.result()] if writing else []
            writing = disk.submit(_write_layer, out, layer, tensors, rows, clock.stop())
        records += [writing.result()] if writing else []
    _write_index(out, len(by_layer), spec)
    return records


def _quantize_layer(
    passage: Passage, module: nn.Module, linears: Sequence[Linear], spec: QuantSpec, tell: Callable[[ModuleRow], None]
) -> tuple[dict[str, Tensor], tuple[ModuleRow, ...]]:
    """Replace a layer's weights by what their codes stand for; return the codes, in host memory, and the log's rows."""
    names = {linear.kind: linear for linear in linears}
    tensors: dict[str, Tensor] = {}
    rows: list[ModuleRow] = []
    for step in STEPS:
        hessian = Hessian()
        for x in passage.inputs_within(linears[0].layer, module, step[0]):
            hessian.add(x)
        for kind in step:
            started = time.perf_counter()
            solved = solve(module.get_parameter(f"{kind}.weight"), hessian, spec)
            _put(module.get_parameter(f"{kind}.weight"), solved)
            for code in CODES:
                tensors[f"{names[kind].module}.{code}"] = getattr(solved.packed, code).cpu()
            rows.append(
                ModuleRow(
                    layer=names[kind].layer,
                    module=kind,
                    loss=solved.loss,
                    samples=hessian.tokens,
                    damp=solved.damp,
                    time=round(time.perf_counter() - started, 3),
                )
            )
            tell(rows[-1])
    return tensors, tuple(rows)


def _put(weight_OI: Tensor, solved: Solved) -> None:
    for start, stop in block_ranges(TensorSpec(dtype="F32", shape=tuple(weight_OI.shape))):
        weight_OI[start:stop] = solved.packed.weight_rows(start, stop)


class _Clock:
    """Wall clock time of a layer, and the highest GPU memory since it began."""

    def __init__(self, place: Place) -> None:
        self._on_gpu = place.device.type == "cuda"
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self._started = time.perf_counter()

    def stop(self) -> tuple[float, int]:
        peak = 0
        if self._on_gpu:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        return round(time.perf_counter() - self._started, 3), peak


def _write_layer(
    out: Path, layer: int, tensors: dict[str, Tensor], rows: tuple[ModuleRow, ...], took: tuple[float, int]
) -> LayerRecord:
    write_bytes(_shard(out, layer), save(tensors))
    sha256 = digest_file(_shard(out, layer)).sha256
    record = LayerRecord(sha256=sha256, modules=rows, seconds=took[0], peak_gpu_bytes=took[1])
    write_bytes(_shard(out, layer).with_suffix(".json"), _RECORD.dump_json(record))
    return record


def finished_layers(out: Path, layers: int) -> list[LayerRecord]:
    """Return the records of the first layers whose shards are what their records say."""
    records: list[LayerRecord] = []
    for layer in range(layers):
        shard = _shard(out, layer)
        if not shard.with_suffix(".json").is_file() or not shard.is_file():
            break
        record = _RECORD.validate_json(shard.with_suffix(".json").read_bytes())
        if digest_file(shard).sha256 != record.sha256:
            break
        records.append(record)
    return records


def _write_index(out: Path, layers: int, spec: QuantSpec) -> None:
    """Make the first layers a checkpoint that can be opened."""
    shards = [_shard(out, layer) for layer in range(layers)]
    owners = {name: shard.name for shard in shards for name in open_safetensors(shard).specs}
    write_bytes(out / INDEX, json.dumps({"weight_map": owners}).encode())
    config = {"quantization_config": spec.quantization_config("layerwise")}
    write_bytes(out / CONFIG, json.dumps(config).encode())


def _shard(out: Path, layer: int) -> Path:
    return out / f"layer-{layer:05d}.safetensors"
