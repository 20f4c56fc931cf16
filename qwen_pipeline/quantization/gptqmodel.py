"""GPTQModel (https://github.com/ModelCloud/GPTQModel), pinned in ``workers/requirements/gptqmodel.txt``.

:func:`quantize_directory` runs in the engine's own process and environment. It leaves the library's checkpoint and its
``quant_log.csv`` in a workshop directory; the stage takes from them what is true.
"""

import csv
import os
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen_pipeline.checkpoint.measure import Stopwatch, resident_peak
from qwen_pipeline.errors import EnvironmentFault
from qwen_pipeline.progress import Observe, Progress
from qwen_pipeline.quantization.dead_channels import settle_dead_channels
from qwen_pipeline.quantization.solver import naming_nan
from qwen_pipeline.quantization.spec import QuantJob, require_device, use_work_dir
from qwen_pipeline.workers.child import report

STOPS = 16
"""How often in a run finished layers are kept to resume from, where GPTQModel can."""


def quantize_directory(spec: Mapping[str, Any], observe: Observe) -> Mapping[str, Any]:
    """Quantize ``job.source`` with ``job.windows`` into ``job.packed``; the files are the result.

    Rounding to nearest as a fallback is switched off; where the solver gives up all the same (a Hessian that is not
    positive definite) GPTQModel logs ``losses.NOT_SOLVED`` as the loss, and the stage's check fails.

    Returns:
        ``seconds``: what the library took to be imported, to load, to quantize and to save.

    Raises:
        EnvironmentFault: The spec wants CUDA and there is none, or the library cannot go on from what it left.
        CheckFailed: A module's loss is NaN.
    """
    job = QuantJob.from_json(spec)
    require_device(job.spec)
    use_work_dir(job)
    os.chdir(job.work_dir)  # the library writes ./logs
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(max(2, (job.spec.threads + 1) // 2))  # with one, its loader cannot start
    torch.set_num_threads(job.spec.threads)

    laps = Stopwatch()
    library: Any = import_module("gptqmodel")
    settings: Any = import_module("gptqmodel.quantization.config")
    laps.lap("import")
    everywhere = settings.MoEConfig(routing=settings.ExpertsRoutingBypass()) if job.spec.all_experts else None
    model = library.GPTQModel.load(
        str(job.source),
        library.GPTQConfig(
            bits=job.spec.bits,
            group_size=job.spec.group_size,
            sym=job.spec.sym,
            desc_act=job.spec.desc_act,
            act_group_aware=job.spec.act_group_aware and not job.spec.desc_act,
            dynamic={f".*(?:{pattern})": dict(own) for pattern, own in job.spec.dynamic.items()} or None,
            damp_percent=job.spec.damp_percent,
            mse=job.spec.mse,
            moe=everywhere,
            fallback=None,
        ),
        device=job.spec.device,
        dtype=torch.float32 if job.spec.device == "cpu" else "auto",
    )
    laps.lap("load")
    settle_before_solving()
    report_before_aborting()
    job.resume.mkdir(exist_ok=True)
    peaks = job.resume / "peaks.csv"
    _follow(model.model.config, peaks, observe)
    windows, masks = (torch.tensor(np.load(file)).long() for file in (job.windows, job.mask))
    with _resuming(model, job.resume / "checkpoint") as checkpoint:
        model.quantize(
            [{"input_ids": row, "attention_mask": mask} for row, mask in zip(windows, masks, strict=True)],
            batch_size=job.spec.batch_size,
            calibration_sort=None,
            checkpoint=checkpoint,
        )
    laps.lap("quantize")
    model.save(str(job.packed))
    laps.lap("save")
    _add_peaks(job.quant_log, peaks)
    return {"seconds": laps.seconds}


def settle_before_solving() -> None:
    """Have GPTQModel's solver settle dead channels before it looks for them, so that it finds none.

    ``module_copy`` is where it takes the weights from, if they are there. A loss that is NaN becomes a fault of ours.
    """
    solver: Any = import_module("gptqmodel.quantization").GPTQ
    quantize = solver.quantize

    def settle_and_quantize(self: Any, blocksize: int = 128) -> Any:
        hessian_II = self.finalize_hessian(target_device=getattr(self.module, "target_device", None))
        self.module_copy = self.clone_module(device=hessian_II.device)
        settle_dead_channels(hessian_II, self.module_copy)
        with naming_nan():
            return quantize(self, blocksize)

    solver.quantize = settle_and_quantize


def report_before_aborting() -> None:
    """Have GPTQModel's threads report an error before they end the process.

    They hand it to whoever waits for them too, and then nobody knows who is first.
    """
    threads: Any = import_module("gptqmodel.utils.threadx").DeviceThreadPool

    def reporting(submit: Callable[..., Any]) -> Callable[..., Any]:
        def submit_reported(self: Any, device: Any, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            return submit(self, device, partial(_do_or_report, task), *args, **kwargs)

        return submit_reported

    threads.submit, threads.submit_serial = reporting(threads.submit), reporting(threads.submit_serial)


def _do_or_report(task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    try:
        return task(*args, **kwargs)
    except Exception as error:
        report(error)
        raise


@contextmanager
def _resuming(model: Any, root: Path) -> Generator[Any, None, None]:
    """Have finished layers kept in ``root``, and go on after those that are there, where GPTQModel knows how to.

    That depends on the family and the settings; see its ``validate_checkpoint_support``. Hidden states are kept with
    them, so that it is done :data:`STOPS` times in a run, not after each layer.

    Raises:
        EnvironmentFault: We were asked to stop; or what is there was left on another kind of GPU, or is damaged.
    """
    checkpoints: Any = import_module("gptqmodel.looper.checkpoint")
    try:
        import_module("gptqmodel.looper.gptq_checkpoint").validate_checkpoint_support(model)
    except NotImplementedError:
        yield None
        return
    for attempt in root.glob("attempt-*"):  # what it offloaded while it was killed
        shutil.rmtree(attempt)
    verify_once()
    interval = ceil(_layers(model.model.config) / STOPS)
    settings = {"path": root, "interval": f"layer:{interval}", "strict_device_check": False}
    try:
        yield checkpoints.CheckpointConfig(**settings)
    except checkpoints.CheckpointStopped as stop:
        raise EnvironmentFault(f"GPTQModel was asked to stop: {stop}", remedy="Run again: it goes on there.") from stop
    except checkpoints.CheckpointError as error:
        shutil.rmtree(root)
        raise EnvironmentFault(
            f"GPTQModel cannot go on from the layers that it finished earlier: {error}",
            remedy="They were removed: run again, and it starts at the first layer.",
        ) from error


def verify_once() -> None:
    """Have GPTQModel read an object of its store again once in a run; it would do so six times whenever it adds one."""
    store: Any = import_module("gptqmodel.looper.checkpoint_store").CheckpointStore
    verify, verified = store.object_path, set[Path]()

    def object_path(self: Any, digest: str) -> Path:
        path: Path = self.root / "objects" / digest
        if path not in verified or not path.exists():
            verify(self, digest)
            verified.add(path)
        return path

    store.object_path = object_path


def _layers(config: Any) -> int:
    return config.get_text_config().num_hidden_layers


def _follow(config: Any, peaks: Path, observe: Observe) -> None:
    """Tell each module's loss, and note the highest memory of a GPU and the host by then: a line of ``peaks`` each.

    GPTQModel's callbacks name layers and modules; only its table of results has losses.
    """
    layers = _layers(config)
    processor: Any = import_module("gptqmodel.looper.gptq_processor").GPTQProcessor
    write_row = processor.log_new_row

    def write_and_tell(self: object, row: Mapping[str, Any]) -> None:
        write_row(self, row)
        gpu = max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())), default=0)
        with peaks.open("a") as file:
            file.write(f"{row['layer']},{row['module']},{gpu},{resident_peak()}\n")
        remark = f"layers.{row['layer']}.{row['module']} loss {row['loss']}"
        observe(Progress(task="quantize", done=int(row["layer"]), total=layers, unit="layers", remark=remark))

    processor.log_new_row = write_and_tell


def _add_peaks(quant_log: Path, peaks: Path) -> None:
    """Give each row of the library's table its memory."""
    with peaks.open(newline="") as file:
        bytes_of = {(layer, module): found for layer, module, *found in csv.reader(file)}
    with quant_log.open(newline="") as file:
        header, *rows = csv.reader(file)
    layer, module = header.index("layer"), header.index("module")
    with quant_log.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*header, "gpu_peak_bytes", "host_peak_bytes"])
        table.writerows([*row, *bytes_of[row[layer], row[module]]] for row in rows)
