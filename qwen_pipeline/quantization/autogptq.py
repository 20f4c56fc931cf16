"""AutoGPTQ 0.7.1 (https://github.com/AutoGPTQ/AutoGPTQ, archived), pinned in ``workers/requirements/autogptq.txt``.

It quantizes on CUDA only, and writes its losses only to its logger. Its codes have the same format as GPTQModel's; the
stage reads the codes and ignores its configs and its zero biases.
"""

import csv
import logging
import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
import torch

from qwen_pipeline.checkpoint.measure import Stopwatch
from qwen_pipeline.errors import EnvironmentFault
from qwen_pipeline.progress import Observe, Progress
from qwen_pipeline.quantization.dead_channels import settle_dead_channels
from qwen_pipeline.quantization.job import QuantJob, require_device, use_work_dir


def quantize_directory(spec: Mapping[str, Any], observe: Observe) -> Mapping[str, Any]:
    """Quantize ``job.source`` with ``job.windows`` into ``job.packed``.

    Returns:
        ``seconds``: those of importing the library, loading, quantizing and saving.

    Raises:
        EnvironmentFault: There is no CUDA device.
    """
    job = QuantJob.from_json(spec)
    if job.spec.device != "cuda":
        raise EnvironmentFault(
            "AutoGPTQ quantizes on CUDA only.", remedy="Use a GPU, or set engine to 'gptqmodel' or 'layerwise'."
        )
    require_device(job.spec)
    use_work_dir(job)
    laps = Stopwatch()
    import_module("auto_gptq")
    laps.lap("import")
    model = _load_model(job)
    laps.lap("load")
    patch_solver()
    losses = LossReader(job, observe)
    _quantize(model, job, losses)
    laps.lap("quantize")
    model.save_quantized(str(job.packed))
    laps.lap("save")
    losses.write()
    return {"seconds": laps.seconds}


def _load_model(job: QuantJob) -> Any:
    library: Any = import_module("auto_gptq")
    return library.AutoGPTQForCausalLM.from_pretrained(
        str(job.source),
        library.BaseQuantizeConfig(
            bits=job.spec.bits,
            group_size=job.spec.group_size,
            sym=job.spec.sym,
            desc_act=job.spec.desc_act,
            damp_percent=job.spec.damp_percent,
            model_file_base_name="model",
        ),
        torch_dtype=torch.float16,  # the library stores scales in the dtype of the model, the format requires float16
    )


def _quantize(model: Any, job: QuantJob, losses: "LossReader") -> None:
    windows = torch.tensor(np.load(job.windows)).long()
    logger = logging.getLogger("auto_gptq")
    logger.addHandler(losses)
    logger.setLevel(logging.INFO)
    model.quantize(
        [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows],
        batch_size=job.spec.batch_size,
        cache_examples_on_gpu=False,
    )


def patch_solver() -> None:
    """Make AutoGPTQ's solver settle dead channels before it looks for them, so that it finds none."""
    solver: Any = import_module("auto_gptq.quantization.gptq").GPTQ
    solve = solver.fasterquant

    def settle_and_solve(self: Any, *arguments: Any, **named: Any) -> Any:
        settle_dead_channels(self.H, self.layer.weight.data)
        return solve(self, *arguments, **named)

    solver.fasterquant = settle_and_solve


class LossReader(logging.Handler):
    """Reads the loss of each module from the library's log: first a line that names the module, then ``avg loss``."""

    _MODULE = re.compile(r"Quantizing (?P<module>\S+) in layer (?P<number>\d+)/(?P<layers>\d+)")
    _LOSS = re.compile(r"avg loss: (?P<loss>\S+)")

    def __init__(self, job: QuantJob, observe: Observe) -> None:
        super().__init__()
        self._job = job
        self._observe = observe
        self._rows: list[tuple[int, str, float]] = []
        self._layers = 0
        self._current = (0, "")

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if begun := self._MODULE.search(message):
            self._current, self._layers = (int(begun["number"]) - 1, begun["module"]), int(begun["layers"])
        elif solved := self._LOSS.search(message):
            layer, module = self._current
            # AutoGPTQ's Hessian and mean are per window, those of the other quantizers per token
            loss = float(solved["loss"]) / self._job.spec.seq_len**2
            self._rows.append((layer, module, loss))
            remark = f"layers.{layer}.{module} loss {loss:.10f}"
            self._observe(Progress(task="quantize", done=layer, total=self._layers, unit="layers", remark=remark))

    def write(self) -> None:
        spec = self._job.spec
        with self._job.quant_log.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(("layer", "module", "loss", "samples", "damp"))
            table.writerows((*row, spec.samples * spec.seq_len, spec.damp_percent) for row in self._rows)
