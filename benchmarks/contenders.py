"""Ways to merge and to pad, this package's and others', each run in its own process and measured from outside.

This module does not import torch: a child's peak memory starts from its parent's.
"""

import importlib.metadata
import importlib.util
import os
import resource
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qwen_pipeline.qwen.padding_spec import DEFAULT_LAYOUT

MERGEKIT = "mergekit==0.1.5"
COPY, START, PEFT, WHOLE_MODEL_PAD, WITH_MERGEKIT = "cp -r", "start", "PEFT merge", "whole-model pad", "mergekit"
"""The baseline; a process that only imports this package's libraries; and other tools."""
MERGE, PAD, FLOATS, BLOCKS = "merge", f"pad, {DEFAULT_LAYOUT}", "quantize, fp8-dynamic", "quantize, fp8"
ONE_PASS, ZEROS = f"merge+pad, one pass, {DEFAULT_LAYOUT}", "merge+pad, one pass, zeros"
"""This package's commands. Those that pad are named with their layout: the default one, or interleaved zeros."""
SAMPLE_SECONDS = 0.01

_MERGE = "merge --base base --adapter adapter --out out"
_ONE_PASS = (
    "merge-pad --base base --adapter adapter --recipe out/merged --out out/padded --tp {degree} --layout {layout}"
)
_PAD = "pad --in base --out out --tp {degree} --layout {layout}"
_QUANTIZE = "quantize --in base --out out --method {method}"
_START = "import os, torch, qwen_pipeline.cli; from qwen_pipeline.stages.merge_pad import merge_pad; os._exit(0)"
_PEFT_START = "import torch; from transformers import AutoModelForCausalLM; from peft import PeftModel;"
_PEFT = (
    _PEFT_START + "model = AutoModelForCausalLM.from_pretrained('base', dtype=torch.bfloat16);"
    "PeftModel.from_pretrained(model, 'adapter').merge_and_unload().save_pretrained('out')"
)
_WHOLE_MODEL_START = "import torch\nfrom transformers import AutoModelForCausalLM\n"
_WHOLE_MODEL_PAD = (
    _WHOLE_MODEL_START
    + """
model = AutoModelForCausalLM.from_pretrained('base', dtype=torch.bfloat16)
live = model.config.intermediate_size
unit = 128 * {degree}
zeros = -live % unit
def widen(weight, axis):
    weight = weight.transpose(0, axis)
    interleaved = torch.stack([weight[:zeros], torch.zeros_like(weight[:zeros])], 1).flatten(0, 1)
    return torch.cat([interleaved, weight[zeros:]]).transpose(0, axis).contiguous()
state = {{
    name: widen(w, 1) if 'down_proj' in name else widen(w, 0) if 'gate_proj' in name or 'up_proj' in name else w
    for name, w in model.state_dict().items()
}}
import os; os.mkdir('out')
torch.save(state, 'out/pytorch_model.bin')
"""
)
"""The procedure of Qwen's documentation: load the model, interleave zeros in the MLP, save the state dict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to do one thing.

    Attributes:
        start: Imports the same libraries and ends; None for a command that is not Python.
        is_peer: Whether it is another project's.
    """

    name: str
    command: tuple[str, ...]
    start: tuple[str, ...] | None = None
    is_peer: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run: seconds without and with the final sync, CPU seconds, peak bytes, bytes left on disk."""

    name: str
    seconds: float
    synced_seconds: float
    cpu_seconds: float
    peak_bytes: int
    written_bytes: int


def own_commands(degree: int) -> list[Contender]:
    """Return this package's commands; they read ``base`` and ``adapter`` and write ``out``."""
    commands = {
        MERGE: _MERGE,
        ONE_PASS: _ONE_PASS.format(degree=degree, layout=DEFAULT_LAYOUT),
        ZEROS: _ONE_PASS.format(degree=degree, layout="interleave"),
        PAD: _PAD.format(degree=degree, layout=DEFAULT_LAYOUT),
        FLOATS: _QUANTIZE.format(method="fp8-dynamic"),
        BLOCKS: _QUANTIZE.format(method="fp8"),
    }
    return [
        Contender(name=name, command=(sys.executable, "-m", "qwen_pipeline", *command.split()), start=_python(_START))
        for name, command in commands.items()
    ]


def baselines() -> list[Contender]:
    return [
        Contender(name=COPY, command=("cp", "-r", "base", "out")),
        Contender(name=START, command=_python(_START)),
    ]


def peers(degree: int, scratch: Path, *, skip: Collection[str]) -> tuple[list[Contender], dict[str, str]]:
    """Return other tools, and those that are left out: name -> reason."""
    optional: dict[str, Callable[[], Contender]] = {
        PEFT: lambda: _needing("peft", PEFT, _PEFT, _PEFT_START),
        WHOLE_MODEL_PAD: lambda: _needing(
            "transformers", WHOLE_MODEL_PAD, _WHOLE_MODEL_PAD.format(degree=degree), _WHOLE_MODEL_START
        ),
        WITH_MERGEKIT: lambda: _with_mergekit(scratch),
    }
    found: list[Contender] = []
    skipped = {name: "as requested" for name in optional if name in skip}
    for name, find in optional.items():
        if name in skipped:
            continue
        try:
            found.append(find())
        except (ImportError, OSError, subprocess.SubprocessError) as error:
            skipped[name] = f"not available ({error})"
            print(f"SKIPPED {name}: {skipped[name]}", file=sys.stderr, flush=True)
    return found, skipped


def make_models(scratch: Path, *, widths: str, layers: int, rank: int) -> Path:
    """Write ``base`` and ``adapter`` in a separate process; return the base."""
    code = (
        "import sys; from pathlib import Path; from benchmarks.models import *; root = Path(sys.argv[1]);"
        "widths, layers, rank = widths_of(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]);"
        "base = write_base(widths, layers, root / 'base');"
        "write_adapter(widths, layers, root / 'adapter', rank=rank, base=base)"
    )
    arguments = (str(scratch), widths, str(layers), str(rank))
    subprocess.run([*_python(code), *arguments], env=_environment(scratch), check=True)
    return scratch / "base"


def run(contender: Contender, scratch: Path) -> Run:
    """Run one contender until its last byte is on disk; its child processes are measured too."""
    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(scratch / "cache", ignore_errors=True)
    os.sync()
    began = time.perf_counter()
    usage, peak_bytes = _run(contender.command, contender.name, scratch)
    seconds = time.perf_counter() - began
    os.sync()
    synced = time.perf_counter() - began
    written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    shutil.rmtree(out, ignore_errors=True)
    return Run(
        name=contender.name,
        seconds=seconds,
        synced_seconds=synced,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=peak_bytes,
        written_bytes=written,
    )


def peak_of_start(contender: Contender, scratch: Path) -> int:
    """Return the peak bytes of a process that only imports a contender's libraries."""
    return _run(contender.start, f"start of {contender.name}", scratch)[1] if contender.start else 0


def _run(command: tuple[str, ...], name: str, scratch: Path) -> tuple[resource.struct_rusage, int]:
    """Run a command; return its resource usage and its peak bytes.

    A process may reset the kernel's high-water mark, and stages do when their work begins. So resident memory is
    also sampled throughout, and the higher figure counts.
    """
    sampled = 0
    with (scratch / "log").open("wb") as log:
        child = subprocess.Popen(command, cwd=scratch, env=_environment(scratch), stdout=log, stderr=log)
        while not (ended := os.wait4(child.pid, os.WNOHANG))[0]:
            sampled = max(sampled, _resident_bytes(child.pid))
            time.sleep(SAMPLE_SECONDS)
    _, status, usage = ended
    child.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise RuntimeError(f"{name} ended with {status}: {(scratch / 'log').read_text()[-2000:]}")
    return usage, max(sampled, usage.ru_maxrss * 1024)


def _resident_bytes(pid: int) -> int:
    with suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _environment(scratch: Path) -> dict[str, str]:
    search_path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": search_path, "XDG_CACHE_HOME": str(scratch / "cache"), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **own}


def _python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def _needing(module: str, name: str, code: str, start: str) -> Contender:
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"no module {module}")
    return Contender(name=name, command=_python(code), start=_python(start), is_peer=True)


def _with_mergekit(scratch: Path) -> Contender:
    """Return a merge by mergekit: the installed one, or one in its own environment."""
    (scratch / "mergekit.yml").write_text(
        "merge_method: passthrough\ndtype: bfloat16\nmodels:\n  - model: base+adapter\n"
    )
    options = ("--lora-merge-cache", "cache/lora", "--no-copy-tokenizer", "--no-write-model-card")
    python = sys.executable if importlib.util.find_spec("mergekit") else _install_mergekit(scratch / "mergekit")
    return Contender(
        name=WITH_MERGEKIT,
        command=(python, "-m", "mergekit.scripts.run_yaml", "mergekit.yml", "out", *options),
        start=(python, "-c", "import mergekit.scripts.run_yaml"),
        is_peer=True,
    )


def _install_mergekit(home: Path) -> str:
    venv.create(home, with_pip=True)
    torch = f"torch=={importlib.metadata.version('torch').partition('+')[0]}"
    subprocess.run([home / "bin" / "pip", "install", "-q", MERGEKIT, "peft", torch], check=True, timeout=900)
    return str(home / "bin" / "python")
