"""How long merging and padding take, beside a plain copy and what others do, in the same run.

``python -m benchmarks.speed`` makes a checkpoint with a real model's widths once, then runs every contender once a
round, in turn, each in a process of its own, followed by a sync, and takes the median. Results go to ``--out`` as JSON
and Markdown after each run, so that whatever ends the rest leaves what was measured. Contenders that this machine lacks
are named as skipped.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine

MERGEKIT = "mergekit==0.1.5"
COPY, START = "cp -r", "start"
"""What all are held against, and a process that imports what ours import and ends."""

_OURS = "from pathlib import Path; from qwen_pipeline.checkpoint.store import Directory as D;"
_MERGE = (
    _OURS
    + "from qwen_pipeline.stages.merge import merge;"
    + "merge(base=Path('base'), fine_tune=Path('adapter'), destination=D(Path('out')))"
)
_ONE_PASS = (
    _OURS
    + "from qwen_pipeline.one_pass import merge_and_pad;"
    + "merge_and_pad(base=Path('base'), fine_tune=Path('adapter'), merged=D(Path('out/merged')),"
    + " padded=D(Path('out/padded')), tensor_parallel={degree})"
)
_PAD = (
    _OURS
    + "from qwen_pipeline.stages.pad import pad;"
    + "pad(source=Path('base'), destination=D(Path('out')), tensor_parallel={degree})"
)
_START = "import torch; from qwen_pipeline.one_pass import merge_and_pad"
_PEFT = (
    "import torch; from transformers import AutoModelForCausalLM; from peft import PeftModel;"
    "model = AutoModelForCausalLM.from_pretrained('base', dtype=torch.bfloat16);"
    "PeftModel.from_pretrained(model, 'adapter').merge_and_unload().save_pretrained('out')"
)
_WHOLE_MODEL_PAD = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained('base', dtype=torch.bfloat16)
live = model.config.intermediate_size
unit = 128 * {degree}
zeros = -live % unit
def widen(weight, axis):
    weight = weight.transpose(0, axis)
    woven = torch.stack([weight[:zeros], torch.zeros_like(weight[:zeros])], 1).flatten(0, 1)
    return torch.cat([woven, weight[zeros:]]).transpose(0, axis).contiguous()
state = {{
    name: widen(w, 1) if 'down_proj' in name else widen(w, 0) if 'gate_proj' in name or 'up_proj' in name else w
    for name, w in model.state_dict().items()
}}
import os; os.mkdir('out')
torch.save(state, 'out/pytorch_model.bin')
"""
"""What Qwen's documentation advises: load the model, weave zeros into the MLP, save the state dict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to do one thing; a peer is somebody else's."""

    name: str
    command: tuple[str, ...]
    is_peer: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run: seconds of the process and with the sync after it, CPU seconds, peak bytes, bytes left on disk."""

    name: str
    seconds: float
    synced_seconds: float
    cpu_seconds: float
    peak_bytes: int
    written_bytes: int


def main(arguments: Sequence[str] | None = None) -> None:
    asked = _arguments(arguments)
    asked.scratch.mkdir(parents=True)
    try:
        print(markdown(measure(asked)))
    finally:
        shutil.rmtree(asked.scratch)


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Make the models, run every contender ``rounds`` times in turn, and return all figures, written after each run."""
    began, scratch = time.monotonic(), asked.scratch.resolve()
    base = _make_models(asked, scratch)
    contenders, skipped = _contenders(asked, scratch)
    report: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "model": json.loads((base / "config.json").read_bytes()),
        "layers": asked.layers,
        "rank": asked.rank,
        "base_bytes": sum(file.stat().st_size for file in base.iterdir()),
        "bare_peak_bytes": _peak_of_bare_interpreter(scratch),
        "skipped": skipped,
    }
    runs: list[Run] = []
    for number in range(asked.rounds):
        round_began = time.monotonic()
        for contender in contenders:
            if contender.is_peer and number >= asked.peer_rounds:
                continue
            runs.append(run(contender, scratch))
            print(f"round {number + 1}: {runs[-1]}", file=sys.stderr, flush=True)
            report |= {"medians": _medians(runs), "runs": [asdict(each) for each in runs]}
            _keep(report, asked.out)
        now = time.monotonic()
        if asked.minutes and (now - began) + (now - round_began) > 60 * asked.minutes and number + 1 < asked.rounds:
            skipped[f"rounds {number + 2} to {asked.rounds}"] = f"no time left of {asked.minutes} minutes"
            break
    _keep(report, asked.out)
    return report


def _keep(report: Mapping[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "speed.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "speed.md").write_text(markdown(report))


def run(contender: Contender, scratch: Path) -> Run:
    """Run one contender to the last byte on disk, in a process whose children's figures count too."""
    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(scratch / "cache", ignore_errors=True)
    os.sync()
    environment = {
        **os.environ,
        "PYTHONPATH": _search_path(),
        "XDG_CACHE_HOME": str(scratch / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    began = time.perf_counter()
    with (scratch / "log").open("wb") as log:
        child = subprocess.Popen(contender.command, cwd=scratch, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    os.sync()
    synced = time.perf_counter() - began
    if status:
        raise RuntimeError(f"{contender.name} ended with {status}: {(scratch / 'log').read_text()[-2000:]}")
    written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    shutil.rmtree(out, ignore_errors=True)
    return Run(
        name=contender.name,
        seconds=seconds,
        synced_seconds=synced,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * 1024,
        written_bytes=written,
    )


def markdown(report: Mapping[str, Any]) -> str:
    """Return the table of medians, with the machine."""
    machine, medians = report["machine"], report["medians"]
    start = medians[START]["seconds"] if START in medians else 0.0
    rows = [
        "| what | s with sync | against cp | s without start | GB/s written | CPU s | peak above torch, MB | rounds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in medians.items():
        ratio = row["synced_seconds"] / medians[COPY]["synced_seconds"]
        working = row["synced_seconds"] - (0.0 if name == COPY else start)
        above = max(0, row["peak_bytes"] - report["bare_peak_bytes"]) / 1e6
        rows.append(
            f"| {name} | {row['synced_seconds']:.1f} | {ratio:.2f} | {working:.1f} "
            f"| {row['written_bytes'] / 1e9 / row['synced_seconds']:.2f} | {row['cpu_seconds']:.1f} | {above:.0f} "
            f"| {row['rounds']} |"
        )
    skipped = "".join(f"\n\nSkipped: {name}: {why}." for name, why in report["skipped"].items())
    return (
        f"# Speed\n\n{report['date']}. {machine['cpu']}, {machine['cores']} cores, Python {machine['python']}. "
        f"Layers of {report['model']['hidden_size']} x {report['model']['intermediate_size']}, "
        f"{report['layers']} of them, vocabulary {report['model']['vocab_size']}: "
        f"{report['base_bytes'] / 1e9:.2f} GB of bfloat16. LoRA of rank {report['rank']} on all linear layers. "
        "Medians of rounds in turn; ours hash the base, never seen before, and what they write. "
        f"Starting Python and importing torch and ours takes {start:.1f} s of each of ours.\n\n"
        + "\n".join(rows)
        + skipped
        + "\n"
    )


def _make_models(asked: argparse.Namespace, scratch: Path) -> Path:
    """Write base and adapter in a process of its own: a child's peak memory counts from its parent's on."""
    code = (
        "import sys; from pathlib import Path; from benchmarks.models import *; root = Path(sys.argv[1]);"
        "widths, layers, rank = widths_of(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]);"
        "base = write_base(widths, layers, root / 'base');"
        "write_adapter(widths, layers, root / 'adapter', rank=rank, base=base)"
    )
    sizes = (asked.widths, str(asked.layers), str(asked.rank))
    environment = {**os.environ, "PYTHONPATH": _search_path()}
    subprocess.run([sys.executable, "-c", code, str(scratch), *sizes], env=environment, check=True)
    return scratch / "base"


def _search_path() -> str:
    return os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))


def _contenders(asked: argparse.Namespace, scratch: Path) -> tuple[list[Contender], dict[str, str]]:
    def python(code: str) -> tuple[str, ...]:
        return (sys.executable, "-c", code.format(degree=asked.degree) if "{degree}" in code else code)

    contenders = [
        Contender(name=COPY, command=("cp", "-r", "base", "out")),
        Contender(name=START, command=python(_START)),
        Contender(name="merge", command=python(_MERGE)),
        Contender(name="merge+pad, one pass", command=python(_ONE_PASS)),
        Contender(name="pad", command=python(_PAD)),
    ]
    optional: dict[str, Callable[[], tuple[str, ...]]] = {
        "PEFT merge": lambda: _needing("peft", python(_PEFT)),
        "whole-model pad": lambda: _needing("transformers", python(_WHOLE_MODEL_PAD)),
        "mergekit": lambda: _mergekit(scratch),
    }
    skipped: dict[str, str] = {}
    for name, find in optional.items():
        if name in asked.skip:
            skipped[name] = "as asked"
            continue
        try:
            contenders.append(Contender(name=name, command=find(), is_peer=True))
        except (ImportError, OSError, subprocess.SubprocessError) as error:
            skipped[name] = f"not to be had here ({error})"
            print(f"SKIPPED {name}: {skipped[name]}", file=sys.stderr, flush=True)
    return contenders, skipped


def _needing(module: str, command: tuple[str, ...]) -> tuple[str, ...]:
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"no module {module}")
    return command


def _mergekit(scratch: Path) -> tuple[str, ...]:
    """Have mergekit merge the adapter on its base: the one at hand, or one in an environment of its own."""
    (scratch / "mergekit.yml").write_text(
        "merge_method: passthrough\ndtype: bfloat16\nmodels:\n  - model: base+adapter\n"
    )
    options = ("--lora-merge-cache", "cache/lora", "--no-copy-tokenizer", "--no-write-model-card")
    python = sys.executable if importlib.util.find_spec("mergekit") else _install_mergekit(scratch / "mergekit")
    return (python, "-m", "mergekit.scripts.run_yaml", "mergekit.yml", "out", *options)


def _install_mergekit(home: Path) -> str:
    venv.create(home, with_pip=True)
    torch = f"torch=={importlib.metadata.version('torch').partition('+')[0]}"
    subprocess.run([home / "bin" / "pip", "install", "-q", MERGEKIT, "peft", torch], check=True, timeout=900)
    return str(home / "bin" / "python")


def _medians(runs: Sequence[Run]) -> dict[str, Mapping[str, float]]:
    fields = ("seconds", "synced_seconds", "cpu_seconds", "peak_bytes", "written_bytes")
    medians: dict[str, Mapping[str, float]] = {}
    for name in dict.fromkeys(each.name for each in runs):
        own = [asdict(each) for each in runs if each.name == name]
        medians[name] = {field: statistics.median(row[field] for row in own) for field in fields} | {"rounds": len(own)}
    return medians


def _peak_of_bare_interpreter(scratch: Path) -> int:
    code = "import resource, torch, pydantic; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    done = subprocess.run([sys.executable, "-c", code], cwd=scratch, check=True, capture_output=True, text=True)
    return int(done.stdout)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="72b", help="72b, 7b, 0.5b or a config.json")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--degree", type=int, default=8, help="tensor-parallel ranks to pad for")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-rounds", type=int, default=5, help="rounds in which others take part")
    parser.add_argument("--minutes", type=float, default=0, help="begin no round that would end later; 0: no limit")
    parser.add_argument("--skip", action="append", default=[], help="a contender to leave out")
    parser.add_argument("--scratch", type=Path, default=Path("build/speed"), help="a directory on the disk to measure")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
