"""The codes of a layer loop that is still running: those of a layer can be read once it is finished.

So a quantized checkpoint is written while later layers are computed, and little of it is left after the last one.
"""

import threading
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.checkpoint.manifest import Contents
from qwen_pipeline.checkpoint.safetensors_file import SafetensorsFile, TensorSpec, open_safetensors
from qwen_pipeline.checkpoint.writer import write_checkpoint
from qwen_pipeline.errors import WorkerFailed
from qwen_pipeline.quantization.job import QuantJob, record_of, shard_of
from qwen_pipeline.qwen.linears import Linear
from qwen_pipeline.transforms.codes.gptq import GptqFormat, gptq_format
from qwen_pipeline.transforms.codes.packed import quantized_checkpoint

if TYPE_CHECKING:
    import torch

WRITE = "write quantized checkpoint"
"""Name of the progress of writing."""
LOOK_SECONDS = 0.1
"""Interval at which a thread looks for the record of the layer that it waits for."""


_FORMS: Mapping[str, GptqFormat] = {}


class Abandoned(Exception):
    """The loop ended without the layer that was to be read."""


class GrowingCodes:
    """The codes that a layer loop writes into a directory without finished layers.

    Args:
        out: The directory.
        linears: The linear layers that the loop quantizes.
        form: The format of the codes.
        forms: Module -> the format of its codes, if it is another.

    Attributes:
        checkpoint: The codes. To read a tensor is to wait for its layer.
    """

    def __init__(
        self, out: Path, linears: Sequence[Linear], form: GptqFormat, forms: Mapping[str, GptqFormat] = _FORMS
    ) -> None:
        self._out, self._over = out, threading.Event()
        self._files: dict[int, SafetensorsFile] = {}
        tensors = {
            f"{linear.module}.{code}": self._tensor(linear, f"{linear.module}.{code}", spec)
            for linear in linears
            for code, spec in forms.get(linear.module, form).code_specs(linear.out_features, linear.in_features).items()
        }
        self.checkpoint = Checkpoint(config={}, tensors=tensors, shards={})

    def abandon(self) -> None:
        """Make every reader that waits for a layer raise :class:`Abandoned`."""
        self._over.set()

    def _tensor(self, linear: Linear, name: str, spec: TensorSpec) -> LazyTensor:
        return LazyTensor(spec=spec, read=partial(self._read, linear.layer, name, spec))

    def _read(self, layer: int, name: str, spec: TensorSpec, start: int, stop: int) -> "torch.Tensor":
        file = self._files.get(layer) or self._wait_for(layer)
        if (found := file.specs.get(name)) != spec:
            raise WorkerFailed(
                f"The engine's {name} is {found}, expected {spec}.",
                remedy="Report this as a defect: the engine writes a format that this pipeline does not support.",
            )
        return file.load(name, start, stop)

    def _wait_for(self, layer: int) -> SafetensorsFile:
        while not record_of(self._out, layer).is_file():
            if self._over.wait(LOOK_SECONDS):
                raise Abandoned
        return self._files.setdefault(layer, open_safetensors(shard_of(self._out, layer)))


@contextmanager
def writing_meanwhile(
    job: QuantJob, source: Checkpoint, linears: Sequence[Linear], config: Mapping[str, Any], out: Path
) -> Generator[Future[Contents] | None]:
    """Write the quantized checkpoint into ``out`` during the body, each layer once the layer loop has finished it.

    Yield None if the engine does not write layer by layer, or continues after layers that it verifies first.
    """
    if job.spec.engine != "layerwise" or any(job.packed.glob("layer-*.json")):
        yield None
        return
    coded = [linear for linear in linears if job.spec.precision_of(linear.module).coded]
    forms = job.spec.forms(linear.module for linear in coded)
    codes = GrowingCodes(job.packed, coded, gptq_format({"quantization_config": config}), forms)
    quantized = quantized_checkpoint(source, codes.checkpoint, linears, config, forms)
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(write_checkpoint, quantized, out, task=WRITE)
        finally:
            codes.abandon()
