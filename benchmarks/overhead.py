"""``python -m benchmarks.overhead``: the overhead of the quantize stage over the engine's own time.

The demo's base, padded as in the demo, is quantized on the CPU with GPTQModel's loop: once by the command line, which
starts a worker, and once by a script that only loads, quantizes and saves (:mod:`benchmarks.plain_gptqmodel`). Two runs
differ by more than the overhead, so the time of the first is also split: importing, loading, quantizing and saving are
the engine's; all the rest, from the start of the process to its end, is the stage's (``ours``). The stage's work while
the engine is imported costs no time, and is subtracted again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.loops import first_layers
from benchmarks.machine import describe_machine, processor_seconds
from benchmarks.report import RESULTS, keep, markdown
from qwen_pipeline.checkpoint.manifest import open_manifest
from qwen_pipeline.checkpoint.store.destinations import Directory
from qwen_pipeline.demo.base import GROUP_SIZE, TENSOR_PARALLEL, build_base
from qwen_pipeline.demo.texts import write_texts
from qwen_pipeline.quantization.calibration.calibration_set import draw_calibration
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.stages.pad import pad
from qwen_pipeline.workers.environments import find_environment

TARGET_RATIO = 0.02
"""Of the engine's own time, for a job of two minutes or more."""


def by_stage(padded: Path, text: Path, spec: QuantSpec, python: Path, out: Path) -> dict[str, Any]:
    """Quantize from the command line; return its seconds, split."""
    flags = {"in": padded, "out": out, "calibration": text, "engine": spec.engine, "engine-python": python}
    flags |= {name.replace("_", "-"): getattr(spec, name) for name in ("group_size", "samples", "seq_len", "seed")}
    flags |= {"threads": spec.threads, "batch-size": spec.batch_size, "device": spec.device}
    options = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    found = _timed([sys.executable, "-m", "qwen_pipeline", "quantize", *options], spec, out.with_suffix(".log"))
    seconds = open_manifest(out).result["seconds"]
    stage, both = seconds["stage"], seconds["both"]
    engine = {**seconds["engine"], "import": seconds["engine"]["import"] + both}
    front = found["seconds"] - sum(engine.values()) - sum(stage.values()) + both
    ours = {"command line": round(front, 3), **stage, "while the engine imports": -both}
    return {**found, "engine": engine, "ours": ours, "ratio": round(sum(ours.values()) / sum(engine.values()), 4)}


def by_script(padded: Path, text: Path, spec: QuantSpec, python: Path, out: Path) -> dict[str, Any]:
    """Quantize with the plain script, the same tokens and settings; return its seconds."""
    names = ("bits", "group_size", "sym", "desc_act", "act_group_aware", "damp_percent", "mse")
    job = {
        "source": str(padded),
        "out": str(out),
        "windows": draw_calibration(text, padded, spec.calibration).input_ids.tolist(),
        "config": {name: getattr(spec, name) for name in names},
        "batch_size": spec.batch_size,
        "threads": spec.threads,
    }
    file = out.with_suffix(".json")
    file.write_text(json.dumps(job))
    script = Path(__file__).with_name("plain_gptqmodel.py")
    return _timed([str(python), "-P", str(script), str(file)], spec, out.with_suffix(".log"))


def _timed(command: Sequence[str], spec: QuantSpec, log: Path) -> dict[str, Any]:
    """Run a process to its end, in the environment that both need on few cores; return wall and processor seconds."""
    threads = str(spec.threads)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "GPTQMODEL_CPU_WORKERS": str(max(2, (spec.threads + 1) // 2)),
    }
    began, used = time.perf_counter(), processor_seconds()
    with log.open("wb") as output:
        subprocess.run(command, env=environment, stdout=output, stderr=output, cwd=log.parent, check=True)
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "processor_seconds": round(processor_seconds() - used, 2),
    }


RUNS = {"stage": by_stage, "script": by_script}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=24, help="calibration windows")
    parser.add_argument("--layers", type=int, help="only the first layers of the model, to test that this runs")
    parser.add_argument("--base", type=Path, help="the demo's base, if it was built before")
    parser.add_argument("--engine-python", type=Path, help="interpreter that has gptqmodel")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "benchmark-overhead")
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead", help="path without suffix")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    text = write_texts(options.scratch).calibration
    base = options.base or build_base(options.scratch / "base").path
    base = first_layers(base, options.layers, options.scratch / f"base-{options.layers}") if options.layers else base
    place = Directory(options.scratch / f"{base.name}-padded")
    padded = pad(
        source=base, destination=place, spec=PaddingSpec(group_size=GROUP_SIZE, tensor_parallel=TENSOR_PARALLEL)
    ).path
    python = find_environment("gptqmodel", options.engine_python).python
    spec = QuantSpec(
        engine="gptqmodel",
        group_size=GROUP_SIZE,
        samples=options.samples,
        seq_len=512,
        threads=options.threads,
        device="cpu",
    )
    rows: list[dict[str, Any]] = []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            for name, run in RUNS.items():
                found = run(padded.resolve(), text.resolve(), spec, python, Path(scratch).resolve() / name)
                rows.append({"round": number, "run": name, **found})
                print(json.dumps(rows[-1]), flush=True)
                _write(options.out, rows, spec)
    print(options.out.with_suffix(".md").read_text())


def table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return each run's seconds."""
    return pd.DataFrame(
        {
            "run": [row["run"] for row in rows],
            "wall s": [f"{row['seconds']:.1f}" for row in rows],
            "processor s": [f"{row['processor_seconds']:.1f}" for row in rows],
            "engine s": [f"{sum(row['engine'].values()):.1f}" if "engine" in row else "" for row in rows],
            "ours s": [f"{sum(row['ours'].values()):.2f}" if "ours" in row else "" for row in rows],
            "ours / engine": [f"{row['ratio']:.2%}" if "ratio" in row else "" for row in rows],
        }
    )


def parts(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return the seconds of each part, means over the stage's runs."""
    runs = [row for row in rows if "ours" in row]
    means = {
        (whose, part): sum(row[whose][part] for row in runs) / len(runs)
        for whose in ("engine", "ours")
        for part in runs[0][whose]
    }
    return pd.DataFrame(
        {
            "whose": [whose for whose, _ in means],
            "part": [part for _, part in means],
            "s": [f"{seconds:.2f}" for seconds in means.values()],
        }
    )


def _write(out: Path, rows: Sequence[Mapping[str, Any]], spec: QuantSpec) -> None:
    machine, day = describe_machine(), datetime.now(UTC).date().isoformat()
    text = f"""# Overhead of the quantize stage over its engine

{day}, {machine["cpu"]}, {machine["cores"]} cores, {spec.threads} threads. The demo's padded base, {spec.bits} bits in
groups of {spec.group_size}, {spec.samples} windows of {spec.seq_len} tokens, GPTQModel's own loop. The target is that
ours is at most {TARGET_RATIO:.0%} of the engine's time where that is two minutes or more.

{markdown(table(rows))}

{markdown(parts(rows))}
"""
    found = {"date": day, "machine": machine, "spec": spec.to_json(), "rows": list(rows)}
    keep(out, text, found)


if __name__ == "__main__":
    main()
