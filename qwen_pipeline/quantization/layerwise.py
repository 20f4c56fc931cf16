"""A layer loop of our own over GPTQModel's solver: one decoder layer in memory, each finished one on disk.

A layer is quantized one input group at a time (:mod:`~qwen_pipeline.quantization.input_groups`). One whole forward pass
then tells the next layer what the quantized layer makes of its inputs. Attention is kept once it is quantized, so that
in products all this is about one and a half forward passes a layer.

A finished layer is a shard, and a row of figures written after it. An interrupted run takes finished layers from there.
"""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save
from torch import Tensor, nn

from qwen_pipeline.checkpoint.digest import block_ranges, digest_file
from qwen_pipeline.checkpoint.lazy import CONFIG, INDEX, Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.measure import Stopwatch, resident_peak
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec, open_safetensors
from qwen_pipeline.checkpoint.writer import write_bytes
from qwen_pipeline.layerwise.forward import LayerStream
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.layerwise.weights import ModelWeights
from qwen_pipeline.progress import Observe, Progress
from qwen_pipeline.quantization.input_groups import input_groups, require_known
from qwen_pipeline.quantization.solver import Solved, solve
from qwen_pipeline.quantization.spec import QuantJob, QuantSpec, require_device, use_work_dir
from qwen_pipeline.qwen.linears import Linear, decoder_linears
from qwen_pipeline.transforms.codes.gptq import CODES
from qwen_pipeline.transforms.codes.packed import quantized_checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRow:
    """What is known of one module: a row of the log.

    Attributes:
        samples: Calibration tokens that it met.
        time: Seconds of the solver, packing included.
        gpu_peak_bytes: Highest GPU memory since the layer began.
        host_peak_bytes: Highest resident memory since the engine began.
    """

    layer: int
    module: str
    loss: float
    samples: int
    damp: float
    time: float
    gpu_peak_bytes: int
    host_peak_bytes: int
    zero_groups: int
    saturated_groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """A finished layer, written once its shard is on disk.

    Attributes:
        sha256: Of the shard.
        seconds: What it took: to ``load`` the weights, to ``capture`` inputs and Hessians, to ``solve``, and the whole
            ``forward`` pass for the next layer.
    """

    sha256: str
    modules: tuple[ModuleRow, ...]
    seconds: Mapping[str, float]
    peak_gpu_bytes: int


_RECORD = TypeAdapter(LayerRecord)


def quantize_directory(spec: Mapping[str, Any], observe: Observe) -> Mapping[str, Any]:
    """Quantize ``job.source`` with ``job.windows`` into ``job.packed``, after the layers that are there already.

    Returns:
        ``layers``: seconds, by part, and highest GPU memory of each. ``seconds``: of the whole.

    Raises:
        EnvironmentFault: The spec wants CUDA and there is none.
        CheckFailed: A module's loss is NaN.
        InputRefused: A linear layer is of an unknown kind.
    """
    laps, job = Stopwatch(), QuantJob.from_json(spec)
    require_device(job.spec)
    use_work_dir(job)
    torch.set_num_threads(job.spec.threads)
    import_module("gptqmodel")
    laps.lap("import")
    job.packed.mkdir(parents=True, exist_ok=True)
    loop = LayerLoop(
        open_checkpoint(job.source),
        torch.from_numpy(np.load(job.windows)).long(),
        torch.from_numpy(np.load(job.mask)).bool(),
        job.spec,
        job.packed,
    )
    laps.lap("load")
    records = loop.run(observe)
    laps.lap("quantize")
    with job.quant_log.open("w", newline="") as file:
        table = csv.DictWriter(file, [field.name for field in fields(ModuleRow)])
        table.writeheader()
        table.writerows(asdict(row) for record in records for row in record.modules)
    layers = [{"seconds": dict(at.seconds), "peak_gpu_bytes": at.peak_gpu_bytes} for at in records]
    return {"layers": layers, "seconds": laps.seconds}


class LayerLoop:
    """The layers of a checkpoint on their way into ``out``, one shard of codes each.

    Args:
        source: In full precision.
        windows_ST: Token ids.
        mask_ST: Which of them are calibrated with; what comes after the last one of a window is filling.
        spec: How to quantize.
        out: An existing directory; layers that are in it are not quantized again.

    Attributes:
        stream: The calibration tokens on their way through the quantized model.
    """

    @torch.inference_mode()
    def __init__(self, source: Checkpoint, windows_ST: Tensor, mask_ST: Tensor, spec: QuantSpec, out: Path) -> None:
        self._source, self._spec, self._out = source, spec, out
        self._linears = decoder_linears(source)
        require_known(self._linears)
        dtype = torch.float32 if spec.device == "cpu" else source[self._linears[0].tensor].torch_dtype
        context = ComputeContext(device=torch.device(spec.device), dtype=dtype)
        self.stream = LayerStream(source, windows_ST.to(context.device).split(spec.batch_size), context)
        self._masks = [mask.flatten() for mask in mask_ST.to(context.device).split(spec.batch_size)]

    @torch.inference_mode()
    def run(self, observe: Observe) -> list[LayerRecord]:
        """Quantize the layers that are not there yet; return the records of all."""
        by_layer = [list(group) for _, group in groupby(self._linears, key=lambda linear: linear.layer)]
        records = finished_layers(self._out, len(by_layer))
        if len(records) < len(by_layer):
            records = self._go_on(records, by_layer, observe)
        _write_index(self._out, len(by_layer), self._spec)
        return records

    def _go_on(
        self, records: list[LayerRecord], by_layer: Sequence[Sequence[Linear]], observe: Observe
    ) -> list[LayerRecord]:
        """Send the tokens through the layers that are finished, then quantize the others."""
        self._take_up(len(records))
        modules = self.stream.coming(ahead_on_gpu=1.0)
        for layer in range(len(records)):
            self.stream.run(layer, next(modules))

        def tell(row: ModuleRow) -> None:
            remark = f"layers.{row.layer}.{row.module} loss {row.loss:.10f}"
            observe(Progress(task="quantize", done=row.layer, total=len(by_layer), unit="layers", remark=remark))

        writing: Future[LayerRecord] | None = None
        with ThreadPoolExecutor(1) as disk:
            for layer in range(len(records), len(by_layer)):
                clock, module = Clock(self.stream.context), next(modules)
                clock.lap("load")
                tensors, rows = self._quantize(module, by_layer[layer], clock, tell)
                self.stream.run(layer, module)
                clock.lap("forward")
                del module
                records += [writing.result()] if writing else []
                writing = disk.submit(_write_layer, self._out, layer, tensors, rows, clock)
            records += [writing.result()] if writing else []
        return records

    def _take_up(self, done: int) -> None:
        """Read layers that are finished from their codes."""
        _write_index(self._out, done, self._spec)
        if done:
            quantization = self._spec.quantization_config("layerwise")
            packed = quantized_checkpoint(self._source, open_checkpoint(self._out), self._linears, quantization)
            weights = ModelWeights(checkpoint=packed, prefix=self.stream.weights.prefix)
            layers = enumerate(self.stream.meta_model.layers[:done])
            self.stream.parts[:done] = [weights.part(f"layers.{n}", layer) for n, layer in layers]

    def _quantize(
        self, module: nn.Module, linears: Sequence[Linear], clock: "Clock", tell: Callable[[ModuleRow], None]
    ) -> tuple[dict[str, Tensor], list[ModuleRow]]:
        """Replace a layer's weights by what their codes stand for; return the codes and the log's rows."""
        tensors: dict[str, Tensor] = {}
        rows: list[ModuleRow] = []
        for group in input_groups(self.stream, self._masks, module, linears, all_experts=self._spec.all_experts):
            clock.lap("capture")
            weights = {at.module: weight for at, weight in zip(group.linears, group.weights, strict=True)}
            tokens, solutions = group.hessian.tokens, solve(weights, group.hessian, self._spec)
            for linear, weight, solved in zip(group.linears, group.weights, solutions, strict=True):
                _put(weight, solved)
                tensors |= {f"{linear.module}.{code}": getattr(solved.packed, code) for code in CODES}
                rows.append(
                    ModuleRow(
                        layer=linear.layer,
                        module=linear.kind,
                        loss=solved.loss,
                        samples=tokens,
                        damp=solved.damp,
                        time=round(clock.lap("solve"), 3),
                        gpu_peak_bytes=clock.gpu_peak_bytes,
                        host_peak_bytes=resident_peak(),
                        zero_groups=solved.zero_groups,
                        saturated_groups=solved.saturated_groups,
                    )
                )
                tell(rows[-1])
        return tensors, rows


def _put(weight_OI: Tensor, solved: Solved) -> None:
    for start, stop in block_ranges(TensorSpec(dtype="F32", shape=tuple(weight_OI.shape))):
        weight_OI[start:stop] = solved.packed.weight_rows(start, stop)


class Clock(Stopwatch):
    """Seconds of a layer, and the highest GPU memory since it began; a lap waits for the GPU."""

    def __init__(self, context: ComputeContext) -> None:
        self._on_gpu = context.device.type == "cuda"
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        super().__init__()

    def lap(self, part: str) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return super().lap(part)

    @property
    def gpu_peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if self._on_gpu else 0


def _write_layer(
    out: Path, layer: int, tensors: Mapping[str, Tensor], rows: Sequence[ModuleRow], clock: Clock
) -> LayerRecord:
    write_bytes(_shard(out, layer), save({name: tensor.cpu() for name, tensor in tensors.items()}))
    sha256 = digest_file(_shard(out, layer)).sha256
    seconds = {part: round(value, 3) for part, value in clock.seconds.items()}
    record = LayerRecord(sha256=sha256, modules=tuple(rows), seconds=seconds, peak_gpu_bytes=rows[-1].gpu_peak_bytes)
    write_bytes(_shard(out, layer).with_suffix(".json"), _RECORD.dump_json(record))
    return record


def finished_layers(out: Path, layers: int) -> list[LayerRecord]:
    """Return the records of the first layers whose shards are what their records say."""
    records: list[LayerRecord] = []
    for layer in range(layers):
        shard = _shard(out, layer)
        if not shard.with_suffix(".json").is_file() or not shard.is_file():
            break
        try:
            record = _RECORD.validate_json(shard.with_suffix(".json").read_bytes())
        except ValidationError:  # of an earlier version: the layer is quantized again
            break
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
