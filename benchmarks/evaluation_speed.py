"""Speed of the streamed evaluation of a reference and its 4-bit candidate, compared with reading them from disk.

``python -m benchmarks.evaluation_speed OUT`` writes a random Qwen2 with Qwen2.5-72B's widths and ``--layers``, rounds
it to codes, and then in turn reads both from end to end and evaluates them together, ``--rounds`` times. It needs a
CUDA device, root permission to drop caches, and 15 GB of disk for 6 layers. Results are written after every round.
``--tiny`` does the same with a tiny model on the CPU, which reads as for a GPU and keeps its caches.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from benchmarks.disk import drop_caches, seconds_to_read, weight_files
from benchmarks.layerwise import WIDE, Size, make_model, tiny
from benchmarks.machine import describe_machine
from benchmarks.report import keep, table
from benchmarks.stalls import Ledger
from qwen_pipeline.checkpoint.lazy import CONFIG, SINGLE_SHARD, Checkpoint, open_checkpoint
from qwen_pipeline.evaluation.logits.activation_range import PeakStream
from qwen_pipeline.evaluation.logits.streamed import evaluate
from qwen_pipeline.layerwise.forward import LayerStream
from qwen_pipeline.layerwise.model import ComputeContext, LayeredModel
from qwen_pipeline.layerwise.prefetch import Prefetcher
from qwen_pipeline.layerwise.weights import ModelWeights
from qwen_pipeline.progress import Progress
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.linears import decoder_linears, load_weight
from qwen_pipeline.transforms.codes.packed import quantized_checkpoint
from qwen_pipeline_tests.rounding import rounded

TARGET = 0.7
COMPUTING: Mapping[str, tuple[type, str]] = {
    "enter": (LayerStream, "__init__"),
    "read rows of the embedding": (ModelWeights, "rows"),
    "build layers": (LayeredModel, "build"),
    "run layers": (PeakStream, "run"),
    "wait for tensors": (Prefetcher, "__next__"),
}
"""Steps of the computing thread, each without the steps within it."""
READING: Mapping[str, tuple[type, str]] = {
    "read": (Prefetcher, "_read"),
    "wait for the bus": (Prefetcher, "_wait_for_copies"),
    "wait for memory": (Prefetcher, "_reserve"),
}
"""Steps of the reading threads, added up; while one waits for memory, none reads."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a directory")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="a directory on the disk to measure")
    parser.add_argument(
        "--until", type=float, default=150, help="begin no round that would end after this many seconds"
    )
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    began, device = time.perf_counter(), torch.device("cpu" if options.tiny else "cuda")
    wide = WIDE["qwen2"]
    toy_size = tiny(wide)
    size = toy_size if options.tiny else wide.changed(num_hidden_layers=options.layers)
    context = ComputeContext(device=device, dtype=torch.bfloat16)
    with (
        tempfile.TemporaryDirectory(dir=options.scratch) as scratch,
        patch.object(ComputeContext, "has_own_memory", new=True),
    ):
        toy = make_pair(toy_size, Path(scratch) / "toy", device)
        evaluate_pair(toy, toy_size, context)  # imports, contexts and kernels are not measured
        models = make_pair(size, Path(scratch) / "models", device)
        rounds: list[dict[str, Any]] = []
        found: dict[str, Any] = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": describe_machine() | {"device": _name(device), "torch": torch.__version__},
            "size": asdict(size),
            "bytes_on_disk": sum(file.stat().st_size for file in weight_files(models.values())),
            "largest_layer_bytes": layer_bytes(models["reference"], context.dtype),
            "seconds_to_make": time.perf_counter() - began,
            "rounds": rounds,
        }
        print(f"made in {found['seconds_to_make']:.1f} s, {found['bytes_on_disk'] / 1e9:.2f} GB", flush=True)
        longest = 0.0
        while len(rounds) < options.rounds and (time.perf_counter() - began) + longest < options.until:
            started = time.perf_counter()
            rounds.append(race(models, size, context))
            longest = max(longest, time.perf_counter() - started)
            keep(options.out / "evaluation-speed", render(found), found)
            print(json.dumps(rounds[-1]), flush=True)
    print(render(found))


def make_pair(size: Size, root: Path, device: torch.device) -> dict[str, Checkpoint]:
    """Write a random model and its weights rounded to codes; the two share everything else."""
    root.mkdir()
    source = open_checkpoint(make_model(size, root / "reference", device.type))
    (root / "codes").mkdir()
    owners: dict[str, str] = {}
    linears = decoder_linears(source)
    for layer in range(size.config["num_hidden_layers"]):
        tensors: dict[str, torch.Tensor] = {}
        for linear in (each for each in linears if each.layer == layer):
            weight_OI = load_weight(source, linear).to(device).float()
            with torch.device(device):
                codes = rounded(weight_OI, size.group_size)
            tensors |= {f"{linear.module}.{code}": tensor.cpu() for code, tensor in codes.items()}
        file = f"model-{layer:05d}.safetensors"
        save_file(tensors, root / "codes" / file, {"format": "pt"})
        owners |= dict.fromkeys(tensors, file)
    (root / "codes" / f"{SINGLE_SHARD}.index.json").write_text(json.dumps({"weight_map": owners}))
    quantization = QuantSpec(group_size=size.group_size, device="cpu").quantization_config("benchmark:0")
    (root / "codes" / CONFIG).write_text(json.dumps({"quantization_config": quantization}))
    packed = open_checkpoint(root / "codes")
    return {"reference": source, "candidate": quantized_checkpoint(source, packed, linears, quantization)}


def race(models: Mapping[str, Checkpoint], size: Size, context: ComputeContext) -> dict[str, Any]:
    """Read the files of both models once, then evaluate them together; on a GPU caches are dropped before each."""
    on_gpu = context.device.type == "cuda"
    cold = on_gpu and drop_caches()
    disk = seconds_to_read(weight_files(models.values()))
    cold = on_gpu and drop_caches() and cold
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with ledger_of(COMPUTING) as computing, ledger_of(READING) as reading:
        started = time.perf_counter()
        through_layers, figures = evaluate_pair(models, size, context)
        ended = time.perf_counter()
    seconds, layers = ended - started, through_layers - started
    parts = dict(computing.clock)
    return {
        "seconds_to_read": disk,
        "seconds_to_evaluate": seconds,
        "share_of_reading_speed": disk / seconds,
        "caches_were_dropped": cold,
        "seconds_until_layers_were_passed": layers,
        "seconds_of_heads_and_figures": seconds - layers,
        "seconds_of_the_computing_thread": parts | {"all else": seconds - sum(parts.values())},
        "seconds_of_reading_threads": dict(reading.clock),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "reserved_gpu_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
        "figures": figures,
    }


def evaluate_pair(
    models: Mapping[str, Checkpoint], size: Size, context: ComputeContext
) -> tuple[float, dict[str, float | None]]:
    """Return the time when all layers were passed, and figures that are the same in every round."""
    windows = torch.randint(
        3, size.config["vocab_size"], (size.windows, size.seq_len), generator=torch.Generator().manual_seed(2)
    )
    passed: list[float] = []

    def observe(_: Progress) -> None:
        passed.append(time.perf_counter())

    found = evaluate(
        models, list(windows), reference="reference", compared=["candidate"], context=context, observe=observe
    )
    divergence = found["candidate"].divergence
    assert divergence
    perplexities = {f"perplexity of the {role}": model.perplexity for role, model in found.items()}
    return passed[-1], perplexities | {"kl": divergence.mean}


def layer_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Return the size of the first layer in ``dtype``."""
    layer = [spec for name, spec in checkpoint.items() if "layers.0." in name]
    return sum(spec.nbytes // spec.torch_dtype.itemsize * dtype.itemsize for spec in layer)


@contextmanager
def ledger_of(steps: Mapping[str, tuple[type, str]]) -> Generator[Ledger]:
    """Measure the time of methods within the body."""
    ledger = Ledger()
    with ExitStack() as stack:
        for step, (owner, name) in steps.items():
            method: Callable[..., Any] = getattr(owner, name)
            stack.enter_context(patch.object(owner, name, ledger.timed(step, method)))
        yield ledger


def render(found: Mapping[str, Any]) -> str:
    """Return the rounds as Markdown."""
    size, rounds, machine = found["size"], found["rounds"], found["machine"]
    config = size["config"]
    columns = [
        "round", "read both, s", "evaluate both, s", "of reading speed", "until layers were passed, s",
        "heads and figures, s", "GPU GiB", "GPU GiB reserved", "cold",
    ]  # fmt: skip
    rows = [
        [
            str(number), f"{at['seconds_to_read']:.2f}", f"{at['seconds_to_evaluate']:.2f}",
            f"{at['share_of_reading_speed']:.2f}", f"{at['seconds_until_layers_were_passed']:.2f}",
            f"{at['seconds_of_heads_and_figures']:.2f}", _gib(at["peak_gpu_bytes"]), _gib(at["reserved_gpu_bytes"]),
            "yes" if at["caches_were_dropped"] else "no",
        ]
        for number, at in enumerate(rounds, start=1)
    ]  # fmt: skip
    share = median(at["share_of_reading_speed"] for at in rounds)
    return f"""# Evaluating two models beside reading them

{found["date"]}, {machine["device"]}, torch {machine["torch"]}, {machine["cores"]} cores ({machine["cpu"]}).
{config["num_hidden_layers"]} layers of {config["hidden_size"]} x {config["intermediate_size"]}, vocabulary
{config["vocab_size"]}, {size["windows"]} windows of {size["seq_len"]} tokens, bfloat16, random weights; the candidate
is rounded to 4 bits in groups of {size["group_size"]}. Both take {found["bytes_on_disk"] / 1e9:.2f} GB on disk; a layer
has {_gib(found["largest_layer_bytes"])} GiB.

{table(columns, rows)}

Median: **{share:.2f}** of reading speed (target: {TARGET}).

{_seconds("The thread that computes", [at["seconds_of_the_computing_thread"] for at in rounds])}

{_seconds("Threads that read, added up", [at["seconds_of_reading_threads"] for at in rounds])}
"""


def _seconds(who: str, rounds: Sequence[Mapping[str, float]]) -> str:
    steps = list(dict.fromkeys(step for at in rounds for step in at))
    rows = [[step, *(f"{at.get(step, 0):.2f}" for at in rounds)] for step in steps]
    return table([f"{who}, s", *(f"round {number}" for number in range(1, len(rounds) + 1))], rows)


def _gib(nbytes: int | None) -> str:
    return f"{nbytes / 2**30:.2f}" if nbytes else ""


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
