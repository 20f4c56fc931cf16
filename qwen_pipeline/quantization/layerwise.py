"""The quantizer ``layerwise``: this package's layer loop over GPTQModel's solver, with one decoder layer in memory.

A layer is quantized one input group at a time (:mod:`~qwen_pipeline.quantization.input_groups`). A complete forward
pass of the quantized layer then computes the inputs of the next layer. The outputs of attention are cached once it is
quantized, so that the matrix products of a layer cost about one and a half forward passes.

Each finished layer is stored as a shard, followed by a record of its figures. An interrupted run continues after the
last finished layer.
"""

import copy
import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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
from qwen_pipeline.layerwise.model import ComputeContext, iter_modules
from qwen_pipeline.layerwise.weights import ModelWeights
from qwen_pipeline.progress import Observe, Progress
from qwen_pipeline.quantization.evidence import ModuleEvidence
from qwen_pipeline.quantization.input_groups import InputGroup, LayerPass, input_groups, require_known
from qwen_pipeline.quantization.job import QuantJob, require_device, use_work_dir
from qwen_pipeline.quantization.losses import LOG_COLUMNS, NOT_SOLVED, log_row
from qwen_pipeline.quantization.solver import Solved, solve
from qwen_pipeline.quantization.recipes import Recipe
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.quantization.steps.solve import solve_by_recipe
from qwen_pipeline.qwen.linears import Linear, decoder_linears
from qwen_pipeline.transforms.codes.gptq import CODES
from qwen_pipeline.transforms.codes.packed import quantized_checkpoint

Report = Callable[[Linear, float], None]
"""Reports the loss of a linear layer once it is solved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """Figures of a finished layer, written once its shard is on disk.

    Attributes:
        sha256: Digest of the shard.
        modules: Rows of the solver's log.
        seconds: Duration of ``load`` (reading the weights), ``capture`` (inputs and Hessians), ``solve``, and
            ``forward`` (the complete pass that computes the inputs of the next layer).
    """

    sha256: str
    modules: tuple[dict[str, Any], ...]
    seconds: Mapping[str, float]
    peak_gpu_bytes: int


_RECORD = TypeAdapter(LayerRecord)


def quantize_directory(spec: Mapping[str, Any], observe: Observe) -> Mapping[str, Any]:
    """Quantize ``job.source`` with ``job.windows`` into ``job.packed``, continuing after the layers that are finished.

    Returns:
        ``layers``: seconds by part and peak GPU memory of each layer. ``seconds``: those of the whole run, by part.

    Raises:
        EnvironmentFault: The spec requires CUDA and there is no GPU.
        CheckFailed: The loss of a module is NaN.
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
        table = csv.DictWriter(file, list(LOG_COLUMNS))
        table.writeheader()
        table.writerows(row for record in records for row in record.modules)
    layers = [{"seconds": dict(record.seconds), "peak_gpu_bytes": record.peak_gpu_bytes} for record in records]
    return {"layers": layers, "seconds": laps.seconds}


class LayerLoop:
    """Quantizes the layers of a checkpoint one after another; writes one shard of codes per layer into ``out``.

    Args:
        source: A full-precision checkpoint.
        windows_ST: Token ids.
        mask_ST: The tokens that are used for calibration; the others are pad tokens at the end of a window.
        spec: Settings of the quantization.
        out: An existing directory; layers that are finished there are not quantized again.

    Attributes:
        stream: The hidden states of the calibration tokens in the quantized model.
        full_stream: Those in the full-precision model, for a recipe that compares the two; else None.
    """

    @torch.inference_mode()
    def __init__(self, source: Checkpoint, windows_ST: Tensor, mask_ST: Tensor, spec: QuantSpec, out: Path) -> None:
        self._source, self._spec, self._out = source, spec, out
        self._linears = decoder_linears(source)
        require_known(self._linears)
        dtype = torch.float32 if spec.device == "cpu" else source[self._linears[0].tensor].torch_dtype
        context = ComputeContext(device=torch.device(spec.device), dtype=dtype)
        batches = windows_ST.to(context.device).split(spec.batch_size)
        both = spec.steps.compares_models
        self.stream = LayerStream(source, batches, context, other_models=int(both))
        self.full_stream = LayerStream(source, batches, context, other_models=1) if both else None
        self._masks = [mask.flatten() for mask in mask_ST.to(context.device).split(spec.batch_size)]

    @torch.inference_mode()
    def run(self, observe: Observe) -> list[LayerRecord]:
        """Quantize the layers that are not finished; return the records of all layers."""
        by_layer = [list(group) for _, group in groupby(self._linears, key=lambda linear: linear.layer)]
        records = finished_layers(self._out, len(by_layer))
        if len(records) < len(by_layer):
            records = self._quantize_remaining(records, by_layer, observe)
        _write_index(self._out, len(by_layer), self._spec)
        return records

    def _quantize_remaining(
        self, records: list[LayerRecord], by_layer: Sequence[Sequence[Linear]], observe: Observe
    ) -> list[LayerRecord]:
        """Run the tokens through the finished layers, then quantize the others."""
        self._use_finished(len(records))
        streams = [self.stream, *([self.full_stream] if self.full_stream else [])]
        finished = [(stream, layer) for layer in range(len(records)) for stream in streams]
        others = [(streams[-1], layer) for layer in range(len(records), len(by_layer))]
        modules = iter_modules([*finished, *others], ahead_on_gpu=1.0)
        for stream, layer in finished:
            stream.run(layer, next(modules))

        def report(linear: Linear, loss: float) -> None:
            remark = f"layers.{linear.layer}.{linear.kind} loss {loss:.10f}"
            observe(Progress(task="quantize", done=linear.layer, total=len(by_layer), unit="layers", remark=remark))

        writing: Future[LayerRecord] | None = None
        with ThreadPoolExecutor(1) as disk:
            for layer in range(len(records), len(by_layer)):
                clock, passes = LayerClock(self.stream.context), self._passes(layer, next(modules))
                clock.lap("load")
                tensors, rows = self._quantize_layer(passes, by_layer[layer], clock, report)
                for each in passes:
                    each.stream.run(layer, each.module)
                clock.lap("forward")
                del passes
                records += [writing.result()] if writing else []
                writing = disk.submit(_write_layer, self._out, layer, tensors, rows, clock)
            records += [writing.result()] if writing else []
        return records

    def _use_finished(self, count: int) -> None:
        """Make the stream read the first ``count`` layers from their codes."""
        _write_index(self._out, count, self._spec)
        if count:
            quantization = self._spec.quantization_config("layerwise")
            packed = quantized_checkpoint(self._source, open_checkpoint(self._out), self._linears, quantization)
            weights = ModelWeights(checkpoint=packed, prefix=self.stream.weights.prefix)
            layers = enumerate(self.stream.meta_model.layers[:count])
            self.stream.parts[:count] = [weights.part(f"layers.{n}", layer) for n, layer in layers]

    def _passes(self, layer: int, module: nn.Module) -> list[LayerPass]:
        """Return the layer to quantize and, if models are compared, a copy that stays in full precision."""
        passes = [LayerPass(stream=self.stream, layer=layer, module=module)]
        if self.full_stream:
            passes.append(LayerPass(stream=self.full_stream, layer=layer, module=copy.deepcopy(module)))
        return passes

    def _quantize_layer(
        self, passes: Sequence[LayerPass], linears: Sequence[Linear], clock: "LayerClock", report: Report
    ) -> tuple[dict[str, Tensor], list[ModuleEvidence]]:
        """Replace the weights of a layer with the dequantized codes; return the codes and their figures."""
        tensors: dict[str, Tensor] = {}
        rows: list[ModuleEvidence] = []
        for group in input_groups(passes, self._masks, linears, all_experts=self._spec.all_experts):
            clock.lap("capture")
            tokens, solutions = group.hessian.tokens, _solve(group, self._spec)
            for linear, weight, solved in zip(group.linears, group.weights, solutions, strict=True):
                _write_dequantized(weight, solved)
                tensors |= {f"{linear.module}.{code}": getattr(solved.packed, code) for code in CODES}
                rows.append(
                    ModuleEvidence(
                        module=linear.module,
                        layer=linear.layer,
                        kind=linear.kind,
                        loss=solved.loss,
                        tokens=tokens,
                        damp=solved.damp,
                        rounded=solved.loss >= NOT_SOLVED,
                        seconds=round(clock.lap("solve"), 3),
                        gpu_peak_bytes=clock.gpu_peak_bytes,
                        host_peak_bytes=resident_peak(),
                        zero_groups=solved.zero_groups,
                        saturated_groups=solved.saturated_groups,
                    )
                )
                report(linear, solved.loss)
        return tensors, rows


def _solve(group: InputGroup, spec: QuantSpec) -> Iterable[Solved]:
    weights = {each.module: weight for each, weight in zip(group.linears, group.weights, strict=True)}
    if spec.steps == Recipe():
        return solve(weights, group.hessian, spec)
    return solve_by_recipe(weights, group.hessian, group.error, spec).values()


def _write_dequantized(weight_OI: Tensor, solved: Solved) -> None:
    for start, stop in block_ranges(TensorSpec(dtype="F32", shape=tuple(weight_OI.shape))):
        weight_OI[start:stop] = solved.packed.weight_rows(start, stop)


class LayerClock(Stopwatch):
    """Measures the seconds of a layer's parts and its peak GPU memory; a lap waits for the GPU."""

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
    out: Path, layer: int, tensors: Mapping[str, Tensor], rows: Sequence[ModuleEvidence], clock: LayerClock
) -> LayerRecord:
    write_bytes(_shard(out, layer), save({name: tensor.cpu() for name, tensor in tensors.items()}))
    record = LayerRecord(
        sha256=digest_file(_shard(out, layer)).sha256,
        modules=tuple(map(log_row, rows)),
        seconds={part: round(value, 3) for part, value in clock.seconds.items()},
        peak_gpu_bytes=rows[-1].gpu_peak_bytes or 0,
    )
    write_bytes(_shard(out, layer).with_suffix(".json"), _RECORD.dump_json(record))
    return record


def finished_layers(out: Path, layers: int) -> list[LayerRecord]:
    """Return the records of the first layers, up to the first whose shard is missing or differs from its record."""
    records: list[LayerRecord] = []
    for layer in range(layers):
        shard = _shard(out, layer)
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


def _write_index(out: Path, layers: int, spec: QuantSpec) -> None:
    """Write the index and the config with which the first layers can be opened as a checkpoint."""
    shards = [_shard(out, layer) for layer in range(layers)]
    owners = {name: shard.name for shard in shards for name in open_safetensors(shard).specs}
    write_bytes(out / INDEX, json.dumps({"weight_map": owners}).encode())
    config = {"quantization_config": spec.quantization_config("layerwise")}
    write_bytes(out / CONFIG, json.dumps(config).encode())


def _shard(out: Path, layer: int) -> Path:
    return out / f"layer-{layer:05d}.safetensors"
