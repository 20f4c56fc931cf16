"""GPTQModel (https://github.com/ModelCloud/GPTQModel), pinned in ``workers/requirements/gptqmodel.txt``.

:func:`quantize_directory` runs in the quantizer's own process and environment. It writes the library's checkpoint and
its ``quant_log.csv`` into the working directory; the stage reads the codes and the figures from them.
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
from qwen_pipeline.quantization.job import QuantJob, require_device, use_work_dir
from qwen_pipeline.quantization.solver import nan_as_check_failed
from qwen_pipeline.workers.child import report

CHECKPOINTS = 16
"""Number of times in a run that the finished layers are saved to resume from, if GPTQModel supports it."""


def quantize_directory(spec: Mapping[str, Any], observe: Observe) -> Mapping[str, Any]:
    """Quantize ``job.source`` with ``job.windows`` into ``job.packed``; the files are the result.

    Rounding to nearest as a fallback is switched off; if the solver gives up nevertheless (the Hessian is not positive
    definite), GPTQModel logs ``losses.NOT_SOLVED`` as the loss, and the check of the stage fails.

    Returns:
        ``seconds``: those of importing the library, loading, quantizing and saving.

    Raises:
        EnvironmentFault: The spec requires CUDA and there is no GPU, or the run cannot be resumed from saved layers.
        CheckFailed: The loss of a module is NaN.
    """
    job = QuantJob.from_json(spec)
    require_device(job.spec)
    use_work_dir(job)
    os.chdir(job.work_dir)  # the library writes ./logs
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(max(2, (job.spec.threads + 1) // 2))  # its loader cannot start with one
    torch.set_num_threads(job.spec.threads)

    laps = Stopwatch()
    import_module("gptqmodel")
    import_module("gptqmodel.quantization.config")
    laps.lap("import")
    model = _load_model(job)
    laps.lap("load")
    patch_solver()
    patch_thread_pool()
    job.resume.mkdir(exist_ok=True)
    peaks = job.resume / "peaks.csv"
    _patch_log(model.model.config, peaks, observe)
    _quantize(model, job)
    laps.lap("quantize")
    model.save(str(job.packed))
    laps.lap("save")
    _add_peaks(job.quant_log, peaks)
    return {"seconds": laps.seconds}


def _load_model(job: QuantJob) -> Any:
    library: Any = import_module("gptqmodel")
    settings: Any = import_module("gptqmodel.quantization.config")
    return library.GPTQModel.load(
        str(job.source),
        library.GPTQConfig(
            bits=job.spec.bits,
            group_size=job.spec.group_size,
            sym=job.spec.sym,
            desc_act=job.spec.desc_act,
            act_group_aware=job.spec.act_group_aware and not job.spec.desc_act,
            dynamic={f".*(?:{pattern})": dict(override) for pattern, override in job.spec.dynamic.items()} or None,
            damp_percent=job.spec.damp_percent,
            mse=job.spec.mse,
            moe=settings.MoEConfig(routing=settings.ExpertsRoutingBypass()) if job.spec.all_experts else None,
            fallback=None,
        ),
        device=job.spec.device,
        dtype=torch.float32 if job.spec.device == "cpu" else "auto",
    )


def _quantize(model: Any, job: QuantJob) -> None:
    windows, masks = (torch.tensor(np.load(file)).long() for file in (job.windows, job.mask))
    with _resuming(model, job.resume / "checkpoint") as checkpoint:
        model.quantize(
            [{"input_ids": row, "attention_mask": mask} for row, mask in zip(windows, masks, strict=True)],
            batch_size=job.spec.batch_size,
            calibration_sort=None,
            checkpoint=checkpoint,
        )


def patch_solver() -> None:
    """Make GPTQModel's solver settle dead channels before it looks for them, so that it finds none.

    The solver takes the weights from ``module_copy`` if it is set. A NaN loss raises :class:`CheckFailed`.
    """
    solver: Any = import_module("gptqmodel.quantization").GPTQ
    quantize = solver.quantize

    def settle_and_quantize(self: Any, blocksize: int = 128) -> Any:
        hessian_II = self.finalize_hessian(target_device=getattr(self.module, "target_device", None))
        self.module_copy = self.clone_module(device=hessian_II.device)
        settle_dead_channels(hessian_II, self.module_copy)
        with nan_as_check_failed():
            return quantize(self, blocksize)

    solver.quantize = settle_and_quantize


def patch_thread_pool() -> None:
    """Make GPTQModel's threads report an error before they end the process.

    GPTQModel also raises the error in the thread that waits for the result; without this patch, which of the two
    happens first is a race.
    """
    threads: Any = import_module("gptqmodel.utils.threadx").DeviceThreadPool

    def reporting(submit: Callable[..., Any]) -> Callable[..., Any]:
        def submit_reported(self: Any, device: Any, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            return submit(self, device, partial(_call_or_report, task), *args, **kwargs)

        return submit_reported

    threads.submit, threads.submit_serial = reporting(threads.submit), reporting(threads.submit_serial)


def _call_or_report(task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    try:
        return task(*args, **kwargs)
    except Exception as error:
        report(error)
        raise


@contextmanager
def _resuming(model: Any, root: Path) -> Generator[Any, None, None]:
    """Save finished layers in ``root``, and resume after those already saved, if GPTQModel supports it.

    Support depends on the family and the settings; see ``validate_checkpoint_support`` there. Hidden states are saved
    too, so this is done :data:`CHECKPOINTS` times in a run, not after each layer.

    Raises:
        EnvironmentFault: The process was terminated; or the saved layers come from another kind of GPU or are damaged.
    """
    checkpoints: Any = import_module("gptqmodel.looper.checkpoint")
    try:
        import_module("gptqmodel.looper.gptq_checkpoint").validate_checkpoint_support(model)
    except NotImplementedError:
        yield None
        return
    for attempt in root.glob("attempt-*"):  # weights that a killed attempt had offloaded
        shutil.rmtree(attempt)
    patch_object_store()
    interval = ceil(_layers(model.model.config) / CHECKPOINTS)
    settings = {"path": root, "interval": f"layer:{interval}", "strict_device_check": False}
    try:
        yield checkpoints.CheckpointConfig(**settings)
    except checkpoints.CheckpointStopped as stop:
        raise EnvironmentFault(
            f"GPTQModel was terminated: {stop}", remedy="Run again: it resumes after the finished layers."
        ) from stop
    except checkpoints.CheckpointError as error:
        shutil.rmtree(root)
        raise EnvironmentFault(
            f"GPTQModel cannot resume from the layers that it saved: {error}",
            remedy="They were removed: run again, and it starts at the first layer.",
        ) from error


def patch_object_store() -> None:
    """Make GPTQModel verify each object of its store once per run, instead of six times per object added."""
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


def _patch_log(config: Any, peaks: Path, observe: Observe) -> None:
    """Report the loss of each module, and append the peaks of GPU and host memory so far to the file ``peaks``.

    GPTQModel's callbacks name layers and modules; only its table of results has losses.
    """
    layers = _layers(config)
    processor: Any = import_module("gptqmodel.looper.gptq_processor").GPTQProcessor
    write_row = processor.log_new_row

    def write_and_report(self: object, row: Mapping[str, Any]) -> None:
        write_row(self, row)
        gpu = max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())), default=0)
        with peaks.open("a") as file:
            file.write(f"{row['layer']},{row['module']},{gpu},{resident_peak()}\n")
        remark = f"layers.{row['layer']}.{row['module']} loss {row['loss']}"
        observe(Progress(task="quantize", done=int(row["layer"]), total=layers, unit="layers", remark=remark))

    processor.log_new_row = write_and_report


def _add_peaks(quant_log: Path, peaks: Path) -> None:
    """Add the columns of memory peaks to the library's table."""
    with peaks.open(newline="") as file:
        bytes_of = {(layer, module): nbytes for layer, module, *nbytes in csv.reader(file)}
    with quant_log.open(newline="") as file:
        header, *rows = csv.reader(file)
    layer, module = header.index("layer"), header.index("module")
    with quant_log.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*header, "gpu_peak_bytes", "host_peak_bytes"])
        table.writerows([*row, *bytes_of[row[layer], row[module]]] for row in rows)
