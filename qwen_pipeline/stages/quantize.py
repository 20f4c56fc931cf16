"""``padded -> quantized``: a quantizer computes codes in its own process; this stage writes and checks them.

8-bit floats need no quantizer: this stage rounds the weights while it writes them.
"""

import functools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.digest import digest_files
from qwen_pipeline.checkpoint.digest_cache import checkpoint_digest
from qwen_pipeline.checkpoint.journal import JOURNAL
from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.manifest import Contents, Derivation
from qwen_pipeline.checkpoint.measure import Stopwatch
from qwen_pipeline.checkpoint.store.canonical import LOGS
from qwen_pipeline.checkpoint.store.derive import WORK_DIR, Built, derive
from qwen_pipeline.checkpoint.store.destinations import Artifact, Destination, as_destination
from qwen_pipeline.checkpoint.store.stage_input import open_input
from qwen_pipeline.checkpoint.writer import write_checkpoint
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.models.open import has_weights, open_model
from qwen_pipeline.progress import Observe, Progress, unobserved
from qwen_pipeline.quantization import checks
from qwen_pipeline.quantization.calibration.calibration_set import (
    CalibrationSet,
    draw_calibration,
    is_prepared,
    load_calibration,
    require_vocabulary,
)
from qwen_pipeline.quantization.evidence import (
    EVIDENCE,
    PLOT,
    ModuleEvidence,
    gather_evidence,
    summarize,
    write_evidence,
)
from qwen_pipeline.quantization.fp8.round import Rounding
from qwen_pipeline.quantization.job import QuantJob
from qwen_pipeline.quantization.losses import loss_json, read_losses
from qwen_pipeline.quantization.output.engine_output import EngineOutput
from qwen_pipeline.quantization.output.growing_codes import WRITE, writing_meanwhile
from qwen_pipeline.quantization.requirements import require_quantizable
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.config import require_full_precision
from qwen_pipeline.qwen.linears import Linear, decoder_linears
from qwen_pipeline.qwen.settle import require_settled
from qwen_pipeline.reports import dump_reports
from qwen_pipeline.text.spec import DEFAULT_TEXT_SPEC, TextSpec
from qwen_pipeline.transforms.codes.packed import quantized_checkpoint
from qwen_pipeline.transforms.tokenizer_fits import embedding_rows
from qwen_pipeline.workers.environments import WorkerEnvironment
from qwen_pipeline.workers.parent import Worker, started_worker

STAGE = "quantized"
UNPADDED_STAGE = "quantized_unpadded"
"""Stage of the merged checkpoint, quantized without padding for comparison only."""
CODE_VERSION = "7"
CHECKS = checks.CHECKS


def quantize(
    *,
    source: Path,
    destination: Destination | Path,
    calibration: str | Path | None = None,
    spec: QuantSpec,
    engine: WorkerEnvironment | None = None,
    text_spec: TextSpec = DEFAULT_TEXT_SPEC,
    stage: str = STAGE,
    observe: Observe = unobserved,
) -> Artifact:
    """Quantize a full-precision checkpoint to GPTQ codes, or to 8-bit floats.

    ``layerwise`` resumes an interrupted attempt at the layer that was interrupted, and so does GPTQModel's own loop for
    the families that it supports; AutoGPTQ starts over. A quantizer that has finished is not run again. Its process
    starts importing while the tokens are drawn, unless the output may already exist. 8-bit floats are written in this
    process, streamed like a merge; an interrupted attempt keeps the finished tensors.

    Args:
        source: The merged and padded checkpoint, stored or a recipe.
        destination: The output directory.
        calibration: A directory that the stage ``calibration`` wrote, whose calibration spec then replaces that of
            ``spec``; or text to draw tokens from: see :mod:`qwen_pipeline.text.sources`. 8-bit floats ignore it.
        spec: Settings of the quantization.
        engine: Environment of the quantizer; 8-bit floats need none.
        text_spec: For text: the share of records that may be skipped, and arguments of the chat template.
        stage: Stage of the output: :data:`STAGE` or :data:`UNPADDED_STAGE`.
        observe: Receives progress for each module.

    Raises:
        QuantizedInputRefused: The source is already quantized.
        InputRefused: A size cannot be packed, the spec does not fit the model, or there is too little calibration text.
        EnvironmentFault: The quantizer's environment, the GPU, memory or disk space is missing.
        CheckFailed: A loss is NaN, or the calibration failed one of its own checks.
    """
    checkpoint, linears = _open_source(source, spec)
    if not spec.needs_calibration:
        read_now = as_destination(destination).may_hold(stage)
        opened = open_input("source", source, open_root=open_model, read_now=read_now, observe=observe)
        return Rounding(source=opened, linears=linears, spec=spec, observe=observe).write(
            stage, CODE_VERSION, destination
        )
    text, environment = _required(calibration, engine, spec)
    prepared, spec = _prepared_tokens(text, spec)
    require_quantizable(checkpoint, linears, spec.for_model(checkpoint.config))
    return _encode(
        source, checkpoint, linears, prepared or text, spec, environment, text_spec, destination, stage, observe
    )


def _encode(
    source: Path,
    checkpoint: Checkpoint,
    linears: Sequence[Linear],
    calibration: CalibrationSet | str | Path,
    spec: QuantSpec,
    engine: WorkerEnvironment,
    text_spec: TextSpec,
    destination: Destination | Path,
    stage: str,
    observe: Observe,
) -> Artifact:
    """Quantize with GPTQ, on tokens that a stage drew or on text to draw them from."""
    laps = Stopwatch()
    with ExitStack() as workers:
        start = functools.partial(_enter_worker, workers, spec, engine)
        early = start() if engine.python.exists() and not as_destination(destination).may_hold(stage) else None
        laps.lap("check")
        is_drawn = isinstance(calibration, CalibrationSet)
        tokens = (
            calibration if is_drawn else draw_calibration(calibration, source, spec.calibration, text_spec=text_spec)
        )
        laps.lap("tokens")
        versions = engine.versions(engine.package, "torch")
        quantization = _Quantization(
            source=source.resolve(),
            checkpoint=checkpoint,
            linears=linears,
            tokens=tokens,
            requested=spec,
            config=spec.quantization_config(f"{engine.package}:{versions[engine.package]}"),
            drawn_here=not is_drawn,
            start=lambda: early or start(),
            laps=laps,
            observe=observe,
        )
        return derive(quantization.derivation(stage, versions), destination, quantization.build)


def _required(
    calibration: str | Path | None, engine: WorkerEnvironment | None, spec: QuantSpec
) -> tuple[str | Path, WorkerEnvironment]:
    """Return the two arguments that only GPTQ needs."""
    if calibration is None:
        raise InputRefused(
            "GPTQ needs calibration text, but none is given.",
            remedy="Pass --calibration, or use a method that needs none, such as --method fp8.",
        )
    assert engine, f"no environment for {spec.engine}"
    assert spec.environment == engine.name, f"a spec for {spec.engine} and an environment of {engine.name}"
    return calibration, engine


def _open_source(source: Path, spec: QuantSpec) -> tuple[Checkpoint, list[Linear]]:
    if spec.reads_files and not has_weights(source):
        raise InputRefused(
            f"{spec.engine} reads stored weights, but those of {source} are computed when they are read.",
            remedy=f"Store them: qwen-pipeline materialize {source}. Or use the engine layerwise.",
        )
    checkpoint = open_model(source)
    require_full_precision(
        checkpoint,
        because="Codes cannot be quantized again.",
        remedy="Quantize the merged and padded checkpoint: merge, then pad, then quantize.",
    )
    require_settled(checkpoint)
    return checkpoint, decoder_linears(checkpoint)


def _prepared_tokens(calibration: str | Path, spec: QuantSpec) -> tuple[CalibrationSet | None, QuantSpec]:
    """Load the tokens if a stage drew them; return them, and the spec with their calibration settings."""
    if not is_prepared(calibration):
        return None, spec
    tokens = load_calibration(Path(calibration))
    return tokens, replace(spec, **asdict(tokens.spec))


def _enter_worker(workers: ExitStack, spec: QuantSpec, engine: WorkerEnvironment) -> Worker:
    """Start the quantizer's process, which ends when ``workers`` is closed."""
    target = f"qwen_pipeline.quantization.{spec.engine}:quantize_directory"
    environment = worker_environment(spec)
    return workers.enter_context(started_worker(engine.python, target, packages=[engine.module], env=environment))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Quantization:
    """A quantization, ready to be built.

    Attributes:
        requested: The spec as it was requested, which identifies the output.
        config: The ``quantization_config`` of the output, without rules for single modules.
        drawn_here: Whether this stage drew the tokens, so that skipped records are its to report.
        start: Starts the quantizer's process, or returns the one that was started early.
        laps: Seconds of this stage, by part.
    """

    source: Path
    checkpoint: Checkpoint
    linears: Sequence[Linear]
    tokens: CalibrationSet
    requested: QuantSpec
    config: Mapping[str, Any]
    drawn_here: bool
    start: Callable[[], Worker]
    laps: Stopwatch
    observe: Observe

    @property
    def spec(self) -> QuantSpec:
        """The spec with the precisions of its preset."""
        return self.requested.for_model(self.checkpoint.config)

    def derivation(self, stage: str, versions: Mapping[str, str]) -> Derivation:
        """Return the derivation of the output.

        Raises:
            InputRefused: The model has no row for a token.
        """
        require_vocabulary(self.tokens, embedding_rows(self.checkpoint))
        inputs = {"source": checkpoint_digest(self.source, observe=self.observe), "calibration": self.tokens.digest}
        self.laps.lap("derive")
        settings = {**self.requested.to_json(), "versions": versions}
        return Derivation(stage=stage, inputs=inputs, spec=settings, code_version=CODE_VERSION)

    def build(self, partial: Path) -> Built:
        import_module("qwen_pipeline.quantization.plot")  # imported now, while the quantizer's process imports too
        log = partial / LOGS / "quantize.log"
        job, output = _open_work_dir(partial, self.source, self.tokens, self.spec)
        self.laps.lap("workshop")
        worker: Worker | None = None
        meanwhile = writing_meanwhile(job, self.checkpoint, self.linears, self.config, partial)
        with nullcontext() if output else meanwhile as writing:
            if not output:
                worker = self.start()
                output = self._run(worker, job, log, writing)
            self.laps.lap("keep")
            losses = read_losses(job.quant_log, self.linears)
            contents, evidence = self._write(job, losses, partial, writing)
        self.laps.lap("evidence")
        reports = checks.check_output(open_checkpoint(partial), self.linears, losses, self.spec)
        if self.drawn_here and self.tokens.records.faults:
            reports.append(self.tokens.records.report())
        self.laps.lap("checks")
        if worker:
            worker.require_end(log=log)
        contents = _with_logs(contents, partial)
        self.laps.lap("end")
        return Built(
            contents=contents,
            result={
                "losses": [loss_json(row) for row in losses],
                "layers": output.worker.value.get("layers", []),
                "quantization": self.config,
                "calibration": self.tokens.statistics(),
                "evidence": summarize(evidence),
                "seconds": _seconds(self.laps, output),
                "checks": dump_reports(reports),
            },
            worker_peak_bytes=output.worker.peak_memory_bytes,
        )

    def _run(self, worker: Worker, job: QuantJob, log: Path, writing: Future[Contents] | None) -> EngineOutput:
        """Run the job in the quantizer's process, which may still be exiting when this returns."""

        def observe(progress: Progress) -> None:
            if writing and writing.done():
                writing.result()  # raises its error, such as that of a full disk
            self.observe(progress)

        result = worker.run_task(job.to_json(), log=log, observe=observe)
        output = EngineOutput(worker=result, seconds=self.laps.lap("worker"))
        output.save(job)
        return output

    def _write(
        self, job: QuantJob, losses: Sequence[ModuleEvidence], partial: Path, writing: Future[Contents] | None
    ) -> tuple[Contents, list[ModuleEvidence]]:
        """Write the checkpoint, unless that has begun, and its logs, and gather the evidence at the same time."""
        forms = self.spec.forms(linear.module for linear in self.linears)
        packed = open_checkpoint(job.packed)
        quantized = quantized_checkpoint(self.checkpoint, packed, self.linears, self.config, forms)
        with ThreadPoolExecutor(1) as pool:
            gathering = pool.submit(_save_evidence, quantized, self.linears, losses, partial)
            if writing:
                contents = writing.result()
                self.observe(Progress(task=WRITE, done=quantized.nbytes, total=quantized.nbytes, unit="bytes"))
            else:
                contents = write_checkpoint(quantized, partial, task=WRITE, observe=self.observe)
            shutil.copyfile(job.quant_log, partial / LOGS / "quant_log.csv")
            self.laps.lap("write")
            return contents, gathering.result()


def _open_work_dir(
    partial: Path, source: Path, tokens: CalibrationSet, spec: QuantSpec
) -> tuple[QuantJob, EngineOutput | None]:
    """Create the working directory, or reuse that of an interrupted attempt.

    The output of a finished quantizer is kept; without one, the state that the quantizer can resume from.
    """
    import numpy as np

    work_dir = (partial / WORK_DIR).resolve()
    job = QuantJob(spec=spec, source=source, windows=work_dir / "windows.npy", work_dir=work_dir)
    output = EngineOutput.load(job)
    if not output:
        for stale in ("tmp",) if spec.engine == "layerwise" else ("tmp", "packed"):
            shutil.rmtree(work_dir / stale, ignore_errors=True)
        (partial / JOURNAL).unlink(missing_ok=True)
    (partial / LOGS).mkdir(exist_ok=True)
    work_dir.mkdir(exist_ok=True)
    np.save(job.windows, tokens.input_ids.numpy())
    np.save(job.mask, tokens.attention_mask.numpy())
    return job, output


def _save_evidence(
    quantized: Checkpoint, linears: Sequence[Linear], losses: Sequence[ModuleEvidence], partial: Path
) -> list[ModuleEvidence]:
    """Gather evidence from the codes; write a table and a plot of it among the logs."""
    from qwen_pipeline.quantization.plot import draw_evidence

    evidence = gather_evidence(quantized, linears, losses)
    write_evidence(evidence, partial / EVIDENCE)
    draw_evidence(evidence, partial / PLOT)
    return evidence


def worker_environment(spec: QuantSpec) -> Mapping[str, str]:
    """Return variables that limit threads and visible GPUs.

    GPTQModel uses all visible GPUs, and a different number of GPUs gives different bytes. Backward passes need cuBLAS's
    fixed workspace for that they always give the same. Segments that expand keep the allocator from holding far more
    memory of the GPU than is in use.
    """
    threads = str(spec.threads)
    gpus = spec.gpus if spec.device == "cuda" else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")[:gpus]
    limits = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ",".join(visible)}
    workspace = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if spec.steps.learned_rounding else {}
    return {**limits, **workspace, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"}


def _seconds(laps: Stopwatch, output: EngineOutput) -> dict[str, Any]:
    """Return the seconds of the quantizer (``engine``) and of this stage (``stage``), by part.

    Worker time that the quantizer does not report counts as the stage's. The import includes all packages that the
    quantizer needs, such as torch; the part of it that overlapped with the stage's preparation is ``both``, and counts
    only as the stage's.
    """
    worker = output.worker
    own: Mapping[str, float] = worker.value["seconds"]
    engine = {**own, "import": own["import"] + worker.import_seconds - worker.early_seconds}
    stage = {**laps.seconds, "worker": output.seconds - sum(engine.values())}
    return {
        "engine": {part: round(seconds, 3) for part, seconds in engine.items()},
        "stage": {part: round(seconds, 3) for part, seconds in stage.items()},
        "both": round(worker.early_seconds, 3),
    }


def _with_logs(contents: Contents, partial: Path) -> Contents:
    logs = {path.relative_to(partial).as_posix(): path for path in (partial / LOGS).iterdir()}
    return replace(contents, files={**contents.files, **digest_files(logs)})
