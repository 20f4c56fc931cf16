"""AutoGPTQ 0.7.1 (https://github.com/AutoGPTQ/AutoGPTQ, archived), pinned in ``workers/requirements/autogptq.txt``.

It quantizes on CUDA only, and tells its losses to its logger only. What it writes has GPTQ's codes like GPTQModel's;
the stage takes those and leaves its configs and its zero biases behind.
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
from qwen_pipeline.quantization.spec import QuantJob, require_device, use_work_dir


def quantize_directory(spec: Mapping[str, Any], observe: Observe) -> Mapping[str, Any]:
    """Quantize ``job.source`` with ``job.windows`` into ``job.packed``.

    Returns:
        ``seconds``: what the library took to be imported, to load, to quantize and to save.

    Raises:
        EnvironmentFault: There is no CUDA device.
    """
    job = QuantJob.from_json(spec)
    if job.spec.device != "cuda":
        raise EnvironmentFault("AutoGPTQ quantizes on CUDA only.", remedy="Use a GPU, or the engine gptqmodel.")
    require_device(job.spec)
    use_work_dir(job)
    laps = Stopwatch()
    library: Any = import_module("auto_gptq")
    laps.lap("import")
    model = library.AutoGPTQForCausalLM.from_pretrained(
        str(job.source),
        library.BaseQuantizeConfig(
            bits=job.spec.bits,
            group_size=job.spec.group_size,
            sym=job.spec.sym,
            desc_act=job.spec.desc_act,
            damp_percent=job.spec.damp_percent,
            model_file_base_name="model",
        ),
        torch_dtype=torch.float16,  # the library stores scales in the dtype of the model, the format wants float16
    )
    laps.lap("load")
    settle_before_solving()
    windows = torch.tensor(np.load(job.windows)).long()
    losses = LossReader(job, observe)
    logger = logging.getLogger("auto_gptq")
    logger.addHandler(losses)
    logger.setLevel(logging.INFO)
    model.quantize(
        [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows],
        batch_size=job.spec.batch_size,
        cache_examples_on_gpu=False,
    )
    laps.lap("quantize")
    model.save_quantized(str(job.packed))
    laps.lap("save")
    losses.write()
    return {"seconds": laps.seconds}


def settle_before_solving() -> None:
    """Have AutoGPTQ's solver settle dead channels before it looks for them, so that it finds none."""
    solver: Any = import_module("auto_gptq.quantization.gptq").GPTQ
    solve = solver.fasterquant

    def settle_and_solve(self: Any, *arguments: Any, **named: Any) -> Any:
        settle_dead_channels(self.H, self.layer.weight.data)
        return solve(self, *arguments, **named)

    solver.fasterquant = settle_and_solve


class LossReader(logging.Handler):
    """Reads each module's loss off the library's log: first the line that names the module, then ``avg loss``."""

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
        if at := self._MODULE.search(message):
            self._current, self._layers = (int(at["number"]) - 1, at["module"]), int(at["layers"])
        elif found := self._LOSS.search(message):
            layer, module = self._current
            loss = float(found["loss"]) / self._job.spec.seq_len**2  # Hessian and mean count windows, others' tokens
            self._rows.append((layer, module, loss))
            remark = f"layers.{layer}.{module} loss {loss:.10f}"
            self._observe(Progress(task="quantize", done=layer, total=self._layers, unit="layers", remark=remark))

    def write(self) -> None:
        spec = self._job.spec
        with self._job.quant_log.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(("layer", "module", "loss", "samples", "damp"))
            table.writerows((*row, spec.samples * spec.seq_len, spec.damp_percent) for row in self._rows)
