"""The recipes, and other quantizers: symmetric codes of the same size, from the same tokens."""

import json
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import processor_seconds
from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.store.destinations import Directory
from qwen_pipeline.evaluation.structure.check import check_structure
from qwen_pipeline.quantization.calibration.calibration_set import draw_calibration
from qwen_pipeline.quantization.recipes import RECIPES, RecipeName
from qwen_pipeline.quantization.spec import QuantizerName, QuantSpec
from qwen_pipeline.qwen.linears import decoder_linears
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline.transforms.codes.dequantize import dequantized
from qwen_pipeline.transforms.codes.packed import quantized_checkpoint
from qwen_pipeline.workers.environments import find_environment

PEER = "GPTQModel"
"""GPTQModel's own loop with its default settings; ratios are to it."""
SCRIPT = Path(__file__).with_name("peers.py")
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to choose codes.

    Attributes:
        recipe: A recipe of this package's layer loop, or ``gptq``.
        engine: The engine of this package's stage.
        library: For a library that the stage does not have: its name among the peers' environments; or ``layerwise``
            for a recipe of other settings than this package's.
        options: Options of the engine or of the library.
    """

    recipe: RecipeName = "gptq"
    engine: QuantizerName = "layerwise"
    library: str = ""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


_MSE = {"weights": {"observer": "memoryless_mse"}}
CONTENDERS: Mapping[str, Contender] = {
    **{name: Contender(recipe=name) for name in RECIPES},
    PEER: Contender(engine="gptqmodel"),
    f"{PEER}, mse": Contender(engine="gptqmodel", options={"mse": 2.4}),
    f"{PEER}, GPTAQ": Contender(library="gptqmodel", options={"gptaq": {"alpha": 0.25}, "act_group_aware": False}),
    f"{PEER}, FOEM": Contender(
        library="gptqmodel", options={"foem": {"alpha": 0.25, "beta": 0.2}, "act_group_aware": False}
    ),
    "AutoRound": Contender(library="auto-round"),
    "AutoRound best": Contender(library="auto-round", options={"iters": 1000}),
    "llm-compressor GPTQ": Contender(library="llm-compressor", options={"method": "gptq"}),
    "llm-compressor GPTQ, mse": Contender(library="llm-compressor", options={"method": "gptq", **_MSE}),
    "llm-compressor AWQ": Contender(library="llm-compressor", options={"method": "awq"}),
    "llm-compressor AWQ, mse": Contender(
        library="llm-compressor", options={"method": "awq", "duo_scaling": "both", **_MSE}
    ),
}
"""AutoRound's best setting also asks for 512 samples; here all have the same tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is quantized, with which tokens, where."""

    source: Path
    calibration: Path
    spec: QuantSpec
    pythons: Mapping[str, Path]
    folder: Path


def run(contender: Contender, task: Run) -> tuple[Checkpoint, dict[str, Any]]:
    """Quantize; return the checkpoint, readable by the streamed evaluation, and what the run cost."""
    started, used = time.perf_counter(), processor_seconds()
    if contender.library:
        checkpoint, figures = _run_library(contender, task)
    else:
        checkpoint, figures = _run_stage(contender, task)
    costs = {
        "seconds": round(time.perf_counter() - started, 1),
        "processor_seconds": round(processor_seconds() - used, 1),
    }
    return checkpoint, costs | figures


def _run_stage(contender: Contender, task: Run) -> tuple[Checkpoint, dict[str, Any]]:
    spec = replace(task.spec, engine=contender.engine, recipe=contender.recipe, **contender.options)
    artifact = quantize(
        source=task.source,
        destination=Directory(task.folder / "quantized"),
        calibration=task.calibration,
        spec=spec,
        engine=find_environment(spec.environment, task.pythons.get(spec.environment)),
    )
    result = artifact.manifest.result
    structure = check_structure(open_checkpoint(task.source), open_checkpoint(artifact.path))
    engine = result["seconds"]["engine"]
    return open_checkpoint(artifact.path), {
        "engine_seconds": round(sum(seconds for part, seconds in engine.items() if part != "import"), 1),
        "host_peak_bytes": artifact.manifest.run.peak_memory_bytes,
        "gpu_peak_bytes": result["evidence"]["gpu_peak_bytes"],
        "failed": [check["name"] for check in result["checks"] if not check["passed"] and not check["skipped"]],
        "structure": list(structure.problems),
        "errors": [layer.get("errors", {}) for layer in result["layers"]],
    }


def _run_library(contender: Contender, task: Run) -> tuple[Checkpoint, dict[str, Any]]:
    """Run a library in its own environment.

    Its codes are read in float32, so that only its rounding counts, not another one to the dtype of the model.

    Raises:
        RuntimeError: The environment was not given, or the library failed; the message quotes its last lines.
    """
    spec, folder = task.spec, task.folder
    if contender.library in ("gptqmodel", "layerwise"):
        python = find_environment("gptqmodel", task.pythons.get("gptqmodel")).python
    elif contender.library in task.pythons:
        python = task.pythons[contender.library]
    else:
        raise RuntimeError(f"Name the interpreter that has {contender.library}: --python {contender.library}=PYTHON")
    np.save(folder / "windows.npy", draw_calibration(task.calibration, task.source, spec.calibration).input_ids.numpy())
    paths = {"source": task.source, "windows": folder / "windows.npy", "out": folder / "out"}
    job = {
        **{name: str(path.resolve()) for name, path in paths.items()},
        "figures": str((folder / "figures.json").resolve()),
        "library": contender.library,
        "options": dict(contender.options),
        **{name: getattr(spec, name) for name in ("bits", "group_size", "device", "threads", "seed")},
    }
    (folder / "job.json").write_text(json.dumps(job))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(spec.threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([*([str(ROOT)] if contender.library == "layerwise" else []), *_python_path()]),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    command = [str(python), "-P", str(SCRIPT), str((folder / "job.json").resolve())]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{contender.library} failed:\n{(ended.stdout + ended.stderr)[-3000:]}")
    figures = json.loads((folder / "figures.json").read_text())
    if contender.library == "layerwise":
        source, packed = open_checkpoint(task.source), open_checkpoint(folder / "out" / "packed")
        layers = json.loads((folder / "out" / "layers.json").read_text())
        config = spec.quantization_config("benchmark:0")
        figures["errors"] = [layer.get("errors", {}) for layer in layers]
        return quantized_checkpoint(source, packed, decoder_linears(source), config), figures
    (config,) = (folder / "out").rglob("config.json")
    checkpoint = open_checkpoint(config.parent)
    readable = dequantized(replace(checkpoint, config={**checkpoint.config, "dtype": "float32"}))
    return readable, figures


def _python_path() -> list[str]:
    return [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each and Path(each) != ROOT]
