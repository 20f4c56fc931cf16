"""``padded -> quantized``: an engine computes codes in a process of its own; what it writes is taken, not trusted."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.digest import digest_files
from qwen_pipeline.checkpoint.digest_cache import checkpoint_digest
from qwen_pipeline.checkpoint.journal import JOURNAL
from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.manifest import LOGS, Contents, Derivation
from qwen_pipeline.checkpoint.measure import Stopwatch
from qwen_pipeline.checkpoint.store.derive import WORK_DIR, Built, derive
from qwen_pipeline.checkpoint.store.destinations import Artifact, Destination
from qwen_pipeline.checkpoint.writer import write_checkpoint
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.quantization import checks
from qwen_pipeline.quantization.calibration.calibration_set import (
    CalibrationSet,
    draw_calibration,
    is_prepared,
    load_calibration,
)
from qwen_pipeline.quantization.engine_output import EngineOutput
from qwen_pipeline.quantization.evidence import EVIDENCE, PLOT, Evidence, gather_evidence, summarize, write_evidence
from qwen_pipeline.quantization.losses import ModuleLoss, read_losses
from qwen_pipeline.quantization.spec import QuantJob, QuantSpec
from qwen_pipeline.qwen.config import require_full_precision
from qwen_pipeline.qwen.linears import Linear, decoder_linears
from qwen_pipeline.reports import dump_reports
from qwen_pipeline.transforms.codes.packed import quantized_checkpoint
from qwen_pipeline.workers.environments import WorkerEnvironment
from qwen_pipeline.workers.parent import Worker, started_worker

STAGE = "quantized"
UNPADDED_STAGE = "quantized_unpadded"
"""Where the merged checkpoint goes, quantized only to be compared with."""
CODE_VERSION = "4"
CHECKS = checks.CHECKS


def quantize(
    *,
    source: Path,
    destination: Destination,
    calibration: str | Path,
    spec: QuantSpec,
    engine: WorkerEnvironment,
    stage: str = STAGE,
    observe: Observe = unobserved,
) -> Artifact:
    """Quantize a full-precision checkpoint to GPTQ codes.

    The derivation holds the digest of the calibration tokens, the whole spec, and the engine's versions. An interrupted
    attempt is continued at the layer that it died in by the engine ``layerwise``, and by GPTQModel's own loop for the
    families it can do that for; AutoGPTQ starts again. No engine does once it has delivered. While tokens are drawn,
    the engine imports already, unless the output may be there.

    Args:
        source: The merged and padded checkpoint.
        destination: Where the quantized checkpoint goes.
        calibration: What the stage ``calibration`` made, whose spec then wins; or text to draw tokens from, here and
            now: see :mod:`qwen_pipeline.text.sources`.
        spec: How to quantize.
        engine: Where the engine runs.
        stage: What the output is: :data:`STAGE` or :data:`UNPADDED_STAGE`.
        observe: Told about each module.

    Raises:
        QuantizedInputRefused: The source is quantized already.
        InputRefused: Sizes that cannot be packed, a spec the model cannot serve, too little calibration text.
        EnvironmentFault: The engine, the GPU, memory or disk space is missing.
        CheckFailed: The solver met a loss that is not a number, or the calibration failed a check of its own.
    """
    assert spec.environment == engine.name, f"a spec for {spec.engine} and an environment of {engine.name}"
    laps = Stopwatch()
    checkpoint = open_checkpoint(source)
    require_full_precision(
        checkpoint,
        because="Codes cannot be quantized again.",
        remedy="Quantize the merged and padded checkpoint: merge, then pad, then quantize.",
    )
    linears = decoder_linears(checkpoint)
    prepared = load_calibration(Path(calibration)) if is_prepared(calibration) else None
    spec = replace(spec, **asdict(prepared.spec)) if prepared else spec
    _require_packable(linears, spec)
    _require_positions(checkpoint, spec)
    _require_maskable(linears, spec)
    _require_alike(linears, spec)
    _require_overrides_land(linears, spec)
    with ExitStack() as ending:

        def start() -> Worker:
            target = f"qwen_pipeline.quantization.{spec.engine}:quantize_directory"
            environment = worker_environment(spec)
            return ending.enter_context(
                started_worker(engine.python, target, packages=[engine.module], env=environment)
            )

        early = start() if engine.python.exists() and not destination.may_hold(stage) else None
        laps.lap("check")
        tokens = prepared or draw_calibration(calibration, source, spec.calibration)
        laps.lap("tokens")
        versions = engine.versions(engine.package, "torch")
        derivation = Derivation(
            stage=stage,
            inputs={"source": checkpoint_digest(source, observe=observe), "calibration": tokens.digest},
            spec={**spec.to_json(), "versions": versions},
            code_version=CODE_VERSION,
        )
        laps.lap("derive")

        def build(partial: Path) -> Built:
            import_module("qwen_pipeline.quantization.plot")  # now, while the engine imports too
            job, engine_output = _open_work_dir(partial, source.resolve(), tokens, spec)
            running, log = None, partial / LOGS / "quantize.log"
            laps.lap("workshop")
            if not engine_output:
                running = early or start()
                worker = running.deliver(job.to_json(), log=log, observe=observe)
                engine_output = EngineOutput(worker=worker, seconds=laps.lap("worker"))
                engine_output.keep(job)
            laps.lap("keep")
            losses = read_losses(job.quant_log, linears)
            quantization = spec.quantization_config(f"{engine.package}:{versions[engine.package]}")
            quantized = quantized_checkpoint(checkpoint, open_checkpoint(job.packed), linears, quantization)
            with ThreadPoolExecutor(1) as beside:
                looking = beside.submit(_keep_evidence, quantized, linears, losses, partial)
                contents = write_checkpoint(quantized, partial, task="write quantized checkpoint", observe=observe)
                shutil.copyfile(job.quant_log, partial / LOGS / "quant_log.csv")
                laps.lap("write")
                evidence = looking.result()
            laps.lap("evidence")
            written = open_checkpoint(partial)
            reports = checks.check_output(written, linears, losses, spec)
            laps.lap("checks")
            if running:
                running.require_end(log=log)
            contents = _with_logs(contents, partial)
            laps.lap("end")
            return Built(
                contents=contents,
                result={
                    "losses": [loss.to_json() for loss in losses],
                    "layers": engine_output.worker.value.get("layers", []),
                    "quantization": quantization,
                    "calibration": tokens.statistics(),
                    "evidence": summarize(evidence),
                    "seconds": _seconds(laps, engine_output),
                    "checks": dump_reports(reports),
                },
                worker_peak_bytes=engine_output.worker.peak_memory_bytes,
            )

        return derive(derivation, destination, build)


def _require_packable(linears: Sequence[Linear], spec: QuantSpec) -> None:
    """Refuse what the engine would take and no kernel could load: partial groups and partial 32-bit words."""
    for linear in linears:
        for axis, size, unit in (("in", linear.in_features, spec.group_size), ("out", linear.out_features, 32)):
            if size % unit:
                raise InputRefused(
                    f"{linear.module} has {axis}_features {size}, which is not a multiple of {unit}.",
                    remedy=f"Pad the checkpoint first: qwen-pipeline pad --group-size {spec.group_size}; "
                    "for hidden or head sizes choose a smaller group size.",
                )


def _require_positions(checkpoint: Checkpoint, spec: QuantSpec) -> None:
    positions = checkpoint.config.get("max_position_embeddings", spec.seq_len)
    if spec.seq_len > positions:
        raise InputRefused(
            f"seq_len is {spec.seq_len}, but the model has {positions} positions; the engine would cut every window.",
            remedy=f"Set seq_len to at most {positions}.",
        )


def _require_maskable(linears: Sequence[Linear], spec: QuantSpec) -> None:
    has_experts = any(linear.is_expert for linear in linears)
    if spec.packing == "documents" and has_experts and spec.engine != "layerwise":
        raise InputRefused(
            "Experts are handed tokens without their windows, so that GPTQModel would calibrate them with filling too.",
            remedy="Pack mixtures of experts as a stream, or use the engine layerwise.",
        )


def _require_alike(linears: Sequence[Linear], spec: QuantSpec) -> None:
    """Refuse a mixture some of whose layers are dense where GPTQModel would stop there, or leave their MLPs out."""
    has_experts = any(linear.is_expert for linear in linears)
    dense = [linear.layer for linear in linears if linear.kind == "mlp.down_proj"]
    if has_experts and dense and spec.engine == "gptqmodel":
        raise InputRefused(
            f"Layer {dense[0]} of this mixture of experts is dense, and GPTQModel's own loop knows experts only.",
            remedy="Use the engine layerwise.",
        )


def _require_overrides_land(linears: Sequence[Linear], spec: QuantSpec) -> None:
    for pattern in spec.dynamic:
        if not any(re.search(pattern, linear.module) for linear in linears):
            raise InputRefused(
                f"dynamic {pattern!r} is found in the name of no module, such as {linears[0].module}.",
                remedy="Correct the expression.",
            )


def _open_work_dir(
    partial: Path, source: Path, tokens: CalibrationSet, spec: QuantSpec
) -> tuple[QuantJob, EngineOutput | None]:
    """Make a workshop, or open an interrupted one; of that stay what was delivered, or what the engine goes on from."""
    import numpy as np

    work_dir = (partial / WORK_DIR).resolve()
    job = QuantJob(spec=spec, source=source, windows=work_dir / "windows.npy", work_dir=work_dir)
    engine_output = EngineOutput.find(job)
    if not engine_output:
        for left in ("tmp",) if spec.engine == "layerwise" else ("tmp", "packed"):
            shutil.rmtree(work_dir / left, ignore_errors=True)
        (partial / JOURNAL).unlink(missing_ok=True)
    (partial / LOGS).mkdir(exist_ok=True)
    work_dir.mkdir(exist_ok=True)
    np.save(job.windows, tokens.input_ids.numpy())
    np.save(job.mask, tokens.attention_mask.numpy())
    return job, engine_output


def _keep_evidence(
    quantized: Checkpoint, linears: Sequence[Linear], losses: Sequence[ModuleLoss], partial: Path
) -> list[Evidence]:
    """Look at the codes; leave a table and a plot among the logs."""
    from qwen_pipeline.quantization.plot import draw_evidence

    evidence = gather_evidence(quantized, linears, losses)
    write_evidence(evidence, partial / EVIDENCE)
    draw_evidence(evidence, partial / PLOT)
    return evidence


def worker_environment(spec: QuantSpec) -> Mapping[str, str]:
    """Return variables for threads and GPUs: GPTQModel takes as many as it sees, and other numbers give other bytes."""
    threads = str(spec.threads)
    gpus = spec.gpus if spec.device == "cuda" else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")[:gpus]
    limits = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ",".join(visible)}
    return {**limits, "HF_HUB_OFFLINE": "1"}


def _seconds(laps: Stopwatch, engine_output: EngineOutput) -> dict[str, Any]:
    """Tell the engine's own seconds from ours: those of the worker that the engine does not account for are ours too.

    Its import is that of all packages it needs, as torch. What went on of it while we prepared is ``both``, counted
    among our seconds only.
    """
    worker = engine_output.worker
    own: Mapping[str, float] = worker.value["seconds"]
    engine = {**own, "import": own["import"] + worker.import_seconds - worker.early_seconds}
    stage = {**laps.seconds, "worker": engine_output.seconds - sum(engine.values())}
    return {
        "engine": {part: round(seconds, 3) for part, seconds in engine.items()},
        "stage": {part: round(seconds, 3) for part, seconds in stage.items()},
        "both": round(worker.early_seconds, 3),
    }


def _with_logs(contents: Contents, partial: Path) -> Contents:
    logs = {path.relative_to(partial).as_posix(): path for path in (partial / LOGS).iterdir()}
    return replace(contents, files={**contents.files, **digest_files(logs)})
