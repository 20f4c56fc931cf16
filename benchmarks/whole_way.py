"""The whole way from a base and a LoRA to a release, stage by stage, each as its own process: what a user waits for.

``python -m benchmarks.whole_way OUT --layers 8`` writes a random base with Qwen2.5-72B's widths and vocabulary and a
LoRA of rank 16 on all linear layers, then merges and pads, calibrates, quantizes, validates and publishes from the
command line. Before each stage all these files are dropped from the page cache. Seconds, bytes, memory and the steps
within a stage are written every few seconds, with their projection to the depth of the real model.
``--stages`` runs some of the stages, on what earlier ones left in ``--scratch``. ``--sizes tiny`` tests that it runs.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.disk import drop_files
from benchmarks.machine import describe_machine
from benchmarks.report import keep, table
from benchmarks.watched import Figures, watch

TENSOR_PARALLEL = 8
LIMITS = {"min_top1_agreement": 0.0, "max_mean_kl": 1e9, "max_perplexity_ratio": 1e9, "max_padding_kl": 1e-3}
"""Random weights predict next to nothing, and a release needs a validation that passes."""
HELD_OUT_WINDOWS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A model to generate, and the amount of calibration text.

    Attributes:
        widths: A name in :data:`benchmarks.models.WIDTHS`, or the path of a ``config.json``.
        depth: Number of layers of the real model.
        layers: Number of layers by default.
    """

    widths: str
    depth: int
    layers: int
    samples: int = 128
    seq_len: int = 2048
    rank: int = 16
    group_size: int = 128


TINY = {
    "hidden_size": 256,
    "intermediate_size": 736,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 2048,
}
SCALES = {
    "72b": Scale(widths="72b", depth=80, layers=8),
    "7b": Scale(widths="7b", depth=28, layers=4),
    "tiny": Scale(widths="tiny.json", depth=80, layers=2, samples=8, seq_len=128, rank=4, group_size=32),
}
GENERATE = """
import sys
from pathlib import Path
from benchmarks.models import widths_of, write_adapter, write_base, write_text, write_tokenizer
widths, layers, rank = widths_of(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
base = write_base(widths, layers, Path("base"))
write_tokenizer(widths, base)
write_adapter(widths, layers, Path("adapter"), rank=rank, base=base)
write_text(widths, Path("calibration.jsonl"), words=int(sys.argv[4]), seed=1)
write_text(widths, Path("held_out.jsonl"), words=int(sys.argv[5]), seed=2)
"""
PUBLISH = """
import qwen_pipeline as qp
from pathlib import Path
from qwen_pipeline.progress import describe
from qwen_pipeline.workers.fast_exit import fast_exit
with fast_exit():
    qp.publish(
        quantized=Path("quantized"), validated=Path("validated"), destination=Path("published"), base_model="base",
        fine_tune="adapter", observe=lambda progress: print(describe(progress)),
    )
    raise SystemExit(0)
"""
OUTPUTS: Mapping[str, tuple[str, ...]] = {
    "generate": ("base", "adapter"),
    "merge-pad": ("merged", "padded"),
    "calibrate": ("calibration",),
    "quantize": ("quantized",),
    "validate": ("validated",),
    "publish": ("published",),
}
"""Stage -> the directories in the scratch directory that it writes."""


def commands(scale: Scale, layers: int, options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the command of each stage; all but generating and publishing are commands of ``qwen-pipeline``."""
    amount = scale.samples * scale.seq_len * 3 // 2
    sizes = [scale.widths, layers, scale.rank, amount, HELD_OUT_WINDOWS * 512 * 2]
    engine = f" --engine-python {options.engine_python}" if options.engine_python else ""
    device = f" --device {options.device}" if options.device else ""
    groups = f" --group-size {scale.group_size}"
    lines = {
        "merge-pad": f"merge-pad --base base --adapter adapter --recipe merged --out padded --tp {TENSOR_PARALLEL}"
        f"{groups}{'' if options.store_padded else ' --no-store-padded'}",
        "calibrate": "calibrate --in padded --out calibration --text calibration.jsonl"
        f" --samples {scale.samples} --seq-len {scale.seq_len}",
        "quantize": f"quantize --in padded --out quantized --calibration calibration --recipe {options.recipe}"
        f"{groups}{device}{engine}",
        "validate": "validate --reference merged --padded padded --candidate quantized --text held_out.jsonl"
        f" --calibration calibration --out validated --tp {TENSOR_PARALLEL} --target vllm:{TENSOR_PARALLEL}{engine}",
    }
    return {
        "generate": [sys.executable, "-c", GENERATE, *map(str, sizes)],
        **{stage: [sys.executable, "-m", "qwen_pipeline", *line.split()] for stage, line in lines.items()},
        "publish": [sys.executable, "-c", PUBLISH],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = _arguments(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # ends the stage, too
    scale, until = SCALES[options.sizes], time.monotonic() + options.until
    layers = options.layers or scale.layers
    scratch = options.scratch.resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "tiny.json").write_text(json.dumps(TINY))
    limits = [f"{name} = {value}" for name, value in LIMITS.items()]
    (scratch / "qwen_pipeline.toml").write_text("\n".join(["[validation.limits]", *limits]) + "\n")
    found = _earlier(options.out, asdict(scale) | {"layers": layers})
    for stage, command in commands(scale, layers, options).items():
        if stage in options.stages and time.monotonic() < until:
            figures = run(stage, command, scratch, found, options, until=until)
            if figures.cut or (figures.exit_code and stage != "validate"):
                print((options.out / f"{stage}.log").read_text()[-3000:])
                break
    print(render(found))


def run(
    stage: str, command: Sequence[str], scratch: Path, found: dict[str, Any], options: argparse.Namespace, *,
    until: float,
) -> Figures:  # fmt: skip
    """Run a stage, and add its figures to the results, from time to time and at the end."""
    for output in OUTPUTS[stage]:
        shutil.rmtree(scratch / output, ignore_errors=True)
        if not options.resume:
            shutil.rmtree(scratch / f"{output}.partial", ignore_errors=True)
    if options.cold:
        drop_files(scratch)

    def note(figures: Figures) -> None:
        found["stages"][stage] = figures.to_json() | {"cold": options.cold}
        keep(options.out / "whole-way", render(found), found)

    figures = watch(
        command, cwd=scratch, env=_environment(scratch), log=options.out / f"{stage}.log", until=until, note=note
    )
    note(figures)
    found["stages"][stage] |= _written(scratch, stage)
    keep(options.out / "whole-way", render(found), found)
    print(f"{stage}: {figures.seconds:.1f} s, exit {figures.exit_code}", flush=True)
    return figures


def _earlier(out: Path, size: Mapping[str, Any]) -> dict[str, Any]:
    """Return earlier results of the same size, to which stages are added, or empty ones."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "whole-way.json"
    if file.is_file() and (found := json.loads(file.read_bytes()))["size"] == size:
        return found
    machine = describe_machine() | {"gpu": _gpu()}
    return {"date": datetime.now(UTC).date().isoformat(), "machine": machine, "size": dict(size), "stages": {}}


def _written(scratch: Path, stage: str) -> dict[str, Any]:
    """Return the size of a stage's output, and the figures in its manifest."""
    roots = [scratch / output for output in OUTPUTS[stage]]
    files = [file for root in roots if root.is_dir() for file in root.rglob("*") if file.is_file()]
    manifest = roots[-1] / "manifest.json"
    read = json.loads(manifest.read_bytes()) if manifest.is_file() else {}
    result = read.get("result", {})
    checks = result.get("checks", [])
    failed = [check["name"] for check in checks if not check["passed"] and not check.get("skipped")]
    return {
        "output_bytes": sum(file.stat().st_size for file in files),
        "manifest": {
            "run": read.get("run"), "digest": read.get("content_digest"), "seconds": result.get("seconds"),
            "layers": result.get("layers"), "not_passed": failed,
        },
    }  # fmt: skip


def projected(stage: Mapping[str, Any], size: Mapping[str, Any]) -> float:
    """Return the seconds of a stage at full depth.

    The time in which a step counts layers, modules or bytes, and that after the last line of progress, grows with the
    number of layers; the time until a step's first line (imports, opening, planning) and all other steps do not. Bytes
    of embeddings are counted as if there were more of them, so this is on the high side. A stage without steps, such as
    drawing tokens for a dense model, does not grow. A token of an answer takes longer too if it is read with a model
    that no longer fits into memory, which few layers cannot show.
    """
    growth, steps = size["depth"] / size["layers"], stage["steps"]
    growing = sum(step["seconds"] for step in steps if step["unit"] in ("layers", "modules", "GB", "MB"))
    growing += stage["after_last"] if steps and not stage["cut"] else 0.0
    return stage["seconds"] + growing * (growth - 1)


def render(found: Mapping[str, Any]) -> str:
    """Return the figures as Markdown."""
    size, machine, stages = found["size"], found["machine"], found["stages"]
    columns = [
        "stage", "s", f"for {size['depth']} layers, min", "processor s", "read, GB", "written, GB", "output, GB",
        "host GiB", "GPU GiB", "",
    ]  # fmt: skip
    rows: list[list[str]] = []
    for name, stage in stages.items():
        if name != "generate":
            rows.append(_row(name, stage, size))
    done = [stage for name, stage in stages.items() if name != "generate"]
    total = [
        "all",
        f"{sum(stage['seconds'] for stage in done):.1f}",
        f"{sum(projected(stage, size) for stage in done) / 60:.1f}",
        *[""] * 7,
    ]
    steps = [
        [
            name, step["task"], f"{step['first']:.1f}", f"{step['last']:.1f}", f"{step['seconds']:.1f}",
            f"{step['done']:g} of {step['total']:g} {step['unit']}",
        ]
        for name, stage in stages.items()
        for step in stage["steps"]
        if name != "generate"
    ]  # fmt: skip
    return f"""# The whole way, stage by stage

{found["date"]}, {machine["gpu"] or "no GPU"}, {machine["cores"]} cores ({machine["cpu"]}). {size["layers"]} layers of
the widths {size["widths"].removesuffix(".json")}, random weights, a LoRA of rank {size["rank"]} on all linear layers,
{size["samples"]} x {size["seq_len"]} calibration tokens.

{table(columns, [*rows, total])}

Host memory is the sum over a stage's processes, sampled; GPU memory is the driver's count. Steps, by their lines of
progress, in seconds since the start of the stage; seconds are those between a step's own lines. Tokens of answers are
projected as if a deeper model fitted into memory, too:

{table(["stage", "step", "first line", "last line", "s", "amount"], steps)}
"""


def _row(name: str, stage: Mapping[str, Any], size: Mapping[str, Any]) -> list[str]:
    remarks = [
        "not finished" if stage["exit_code"] is None or stage["cut"] else "",
        f"exit {stage['exit_code']}" if stage["exit_code"] and not stage["cut"] else "",
        "" if stage["cold"] else "cache kept",
    ]
    return [
        name, f"{stage['seconds']:.1f}", f"{projected(stage, size) / 60:.1f}", f"{stage['processor_seconds']:.1f}",
        f"{stage['read_bytes'] / 1e9:.2f}", f"{stage['written_bytes'] / 1e9:.2f}",
        f"{stage.get('output_bytes', 0) / 1e9:.2f}", f"{stage['peak_host_bytes'] / 2**30:.2f}",
        f"{stage['peak_gpu_bytes'] / 2**30:.2f}" if stage["peak_gpu_bytes"] else "", ", ".join(filter(None, remarks)),
    ]  # fmt: skip


def _environment(scratch: Path) -> dict[str, str]:
    search_path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": search_path, "XDG_CACHE_HOME": str(scratch / "cache"), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **own, "PYTHONUNBUFFERED": "1"}


def _gpu() -> str | None:
    if not (program := shutil.which("nvidia-smi")):
        return None
    query = [program, "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or None


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory for results and logs")
    parser.add_argument("--sizes", choices=SCALES, default="72b")
    parser.add_argument("--layers", type=int, help="default: 8 of 72b, 4 of 7b")
    parser.add_argument("--scratch", type=Path, default=Path("build/whole-way"), help="kept; on the disk to measure")
    stages = list(OUTPUTS)
    parser.add_argument("--stages", type=lambda text: text.split(","), default=stages, help=",".join(stages))
    parser.add_argument("--resume", action="store_true", help="keep what a stage that was cut had finished")
    parser.add_argument("--until", type=float, default=1e9, help="end everything after this many seconds")
    parser.add_argument("--no-cold", dest="cold", action="store_false", help="keep the files in the page cache")
    parser.add_argument("--no-store-padded", dest="store_padded", action="store_false", help="padded is a recipe too")
    parser.add_argument("--recipe", default="gptq", help="of the quantization")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="of the quantization")
    parser.add_argument("--engine-python", type=Path, help="interpreter that has gptqmodel")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
