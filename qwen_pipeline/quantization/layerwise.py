"""The quantizer ``layerwise``: this package's layer loop over GPTQModel's solver, with one decoder layer in memory.

A layer is quantized one input group at a time (:mod:`~qwen_pipeline.quantization.input_groups`). A complete forward
pass of the quantized layer then computes the inputs of the next layer. The outputs of attention are cached once it is
quantized, so that the matrix products of a layer cost about one and a half forward passes. A recipe that compares
models takes the full-precision model along, with twice the hidden states and forward passes.

Each finished layer is stored as a shard, followed by a record of its figures. An interrupted run continues after the
last finished layer.
"""

import copy
import csv
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.measure import Stopwatch
from qwen_pipeline.layerwise.forward import LayerStream
from qwen_pipeline.layerwise.model import ComputeContext, iter_modules
from qwen_pipeline.layerwise.weights import ModelWeights
from qwen_pipeline.models.open import open_model
from qwen_pipeline.progress import Observe, Progress
from qwen_pipeline.quantization.decoder_layer import LayerClock, LayerQuantization
from qwen_pipeline.quantization.input_groups import LayerPass, require_known
from qwen_pipeline.quantization.job import QuantJob, require_device, use_work_dir
from qwen_pipeline.quantization.losses import LOG_COLUMNS
from qwen_pipeline.quantization.output.layer_shards import LayerRecord, finished_layers, write_index, write_layer
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.linears import Linear, decoder_linears
from qwen_pipeline.transforms.codes.packed import quantized_checkpoint


def quantize_directory(spec: Mapping[str, Any], observe: Observe) -> Mapping[str, Any]:
    """Quantize ``job.source`` with ``job.windows`` into ``job.packed``, continuing after the layers that are finished.

    Returns:
        ``layers``: figures of each layer (:class:`~qwen_pipeline.quantization.output.layer_shards.LayerRecord`).
        ``seconds``: those of the whole run, by part.

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
        open_model(job.source),
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
    return {"layers": [record.to_json() for record in records], "seconds": laps.seconds}


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
        write_index(self._out, len(by_layer), self._spec)
        return records

    def _quantize_remaining(
        self, records: list[LayerRecord], by_layer: Sequence[Sequence[Linear]], observe: Observe
    ) -> list[LayerRecord]:
        """Run the tokens through the finished layers, then quantize the others."""
        self._use_finished(records)
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
                coded = [linear for linear in by_layer[layer] if self._spec.precision_of(linear.module).coded]
                quantization = LayerQuantization(passes, self._masks, coded, self._spec, clock)
                quantization.run(report)
                tensors, rows, errors = quantization.tensors, quantization.rows, quantization.errors
                del passes, quantization
                records += [writing.result()] if writing else []
                writing = disk.submit(write_layer, self._out, layer, tensors, rows, clock.seconds, errors)
            records += [writing.result()] if writing else []
        return records

    def _use_finished(self, records: Sequence[LayerRecord]) -> None:
        """Make the stream read the finished layers from their codes; layers that keep all weights have none."""
        count = len(records)
        write_index(self._out, count, self._spec)
        if any(record.modules for record in records):
            quantization = self._spec.quantization_config("layerwise")
            forms = self._spec.forms(linear.module for linear in self._linears)
            packed = quantized_checkpoint(self._source, open_checkpoint(self._out), self._linears, quantization, forms)
            weights = ModelWeights(checkpoint=packed, prefix=self.stream.weights.prefix)
            layers = enumerate(self.stream.meta_model.layers[:count])
            self.stream.parts[:count] = [weights.part(f"layers.{n}", layer) for n, layer in layers]

    def _passes(self, layer: int, module: nn.Module) -> list[LayerPass]:
        """Return the layer to quantize and, if models are compared, a copy that stays in full precision."""
        passes = [LayerPass(stream=self.stream, layer=layer, module=module)]
        if self.full_stream:
            passes.append(LayerPass(stream=self.full_stream, layer=layer, module=copy.deepcopy(module)))
        return passes
