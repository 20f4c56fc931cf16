"""Comparison of the layer loop with GPTQModel's own loop, at real widths.

``python -m benchmarks.layerwise OUT`` makes a random Qwen2 with 72B widths and few layers in a scratch directory,
quantizes it with each contender and the same calibration tokens, in a process each, evaluates reference and candidates
together, and quantizes a smaller one twice. ``--family`` does the same with a mixture of experts or a hybrid. It needs
a CUDA device, gptqmodel in the environment of ``--python`` (by default this one), 20 GB of disk and about six minutes;
results are written as they come. ``--small`` is for the CPU, and so is ``--tiny``, which only tests that it runs.
"""

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.machine import describe_machine, processor_seconds
from benchmarks.report import markdown, table
from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.progress import Observe, Progress
from qwen_pipeline.quantization.job import QuantJob
from qwen_pipeline.quantization.spec import Device, QuantizerName, QuantSpec
from qwen_pipeline.qwen.linears import decoder_linears
from qwen_pipeline.stages.quantize import worker_environment
from qwen_pipeline.workers.parent import run_worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A Qwen model, and the amount of text.

    Attributes:
        config: Fields of Transformers' config, ``model_type`` included.
        batch: Windows per batch.
        windows: Number of held-out windows.
    """

    config: Mapping[str, Any]
    samples: int = 128
    seq_len: int = 2048
    batch: int = 8
    windows: int = 8
    group_size: int = 128

    def changed(self, **config: Any) -> "Size":
        return replace(self, config={**self.config, **config})


ENDS = {"vocab_size": 32768, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
WIDE = {
    "qwen2": Size(
        config={
            "model_type": "qwen2",
            "hidden_size": 8192,
            "intermediate_size": 29696,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "num_hidden_layers": 3,
            **ENDS,
        }
    ),
    "qwen3_moe": Size(
        config={
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_hidden_layers": 2,
            **ENDS,
        }
    ),
    "qwen3_5_text": Size(
        config={
            "model_type": "qwen3_5_text",
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "num_hidden_layers": 4,
            **ENDS,
        }
    ),
}
"""Widths of Qwen2.5-72B (padded for eight ranks), Qwen3-30B-A3B and Qwen3.5-9B."""
DEPTHS = {"qwen2": 80, "qwen3_moe": 48, "qwen3_5_text": 32}
"""Number of layers of those models."""
TINY = {
    "qwen2": {"intermediate_size": 384},
    "qwen3_moe": {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32},
    "qwen3_5_text": {
        "intermediate_size": 384,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    },
}


def tiny(size: Size) -> Size:
    """Return a tiny model of the same family, for the CPU."""
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    own = TINY[size.config["model_type"]]
    toy = size.changed(**(sizes | own | {"layer_types": None, "vocab_size": 512}))
    return replace(toy, samples=16, seq_len=64, windows=4, group_size=32)


def small(size: Size) -> Size:
    """Return a model of the same family that a GPU quantizes in seconds, a CPU in minutes."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 2, "num_experts": 8, "intermediate_size": 2944}
    return replace(
        size.changed(**{name: value for name, value in sizes.items() if name in size.config}),
        samples=16,
        seq_len=512,
        windows=4,
    )


def main() -> None:
    """Run everything; write ``layerwise.json`` and ``layerwise.md`` into the directory given, after every step."""
    arguments = _arguments()
    wide, device = WIDE[arguments.family], "cpu" if arguments.tiny or arguments.small else "cuda"
    size, smaller = wide, small(wide)
    if device == "cpu":
        size, smaller = tiny(wide) if arguments.tiny else small(wide), tiny(wide)
    if arguments.layers:
        size = size.changed(num_hidden_layers=arguments.layers)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": _machine(device), "size": asdict(size)}

    def note(step: str, found: Mapping[str, Any]) -> None:
        results[step] = dict(found)
        (arguments.out / "layerwise.json").write_text(json.dumps(results, indent=2) + "\n")
        (arguments.out / "layerwise.md").write_text(render(results))
        print(f"{step}: {json.dumps(found)[:2000]}", flush=True)

    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder, ThreadPoolExecutor(1) as pool:
        scratch, started = Path(folder), time.perf_counter()
        warming = pool.submit(_call, arguments.python, "warm_up", {}, scratch) if device == "cuda" else None
        source = make_model(size, scratch / "model", device)
        note("generate", {"seconds": time.perf_counter() - started, "bytes": open_checkpoint(source).nbytes})
        if warming:
            note("warm-up: the solver's kernels are compiled once a machine", warming.result())
        jobs = {
            name: _job(size, source, scratch / name, engine, device, gpus)
            for name, (engine, gpus) in contenders(arguments.gpus).items()
        }
        for name, job in jobs.items():
            note(name, quantize(job, arguments.python))
        evaluation = _evaluation(size, jobs, device)
        note("evaluation", _call(arguments.python, "evaluate_all", evaluation, scratch))
        source = make_model(smaller, scratch / "smaller", device)
        for name, (engine, gpus) in contenders(arguments.gpus).items():
            runs = [
                _job(smaller, source, scratch / f"{name} {run}", engine, device, gpus) for run in ("first", "second")
            ]
            for job in runs:
                quantize(job, arguments.python)
            note(f"two equal runs: {name}", compare(*runs))


def contenders(gpus: int) -> Mapping[str, tuple[QuantizerName, int]]:
    """Return engine and number of GPUs by name."""
    one: dict[str, tuple[QuantizerName, int]] = {"layerwise": ("layerwise", 1), "gptqmodel": ("gptqmodel", 1)}
    if gpus > 1:
        one[f"gptqmodel, {gpus} GPUs"] = ("gptqmodel", gpus)
    return one


def _job(size: Size, source: Path, work_dir: Path, engine: QuantizerName, device: Device, gpus: int) -> QuantJob:
    spec = QuantSpec(
        engine=engine, group_size=size.group_size, samples=size.samples, seq_len=size.seq_len, batch_size=size.batch,
        device=device, gpus=gpus,
    )  # fmt: skip
    work_dir.mkdir()
    return QuantJob(spec=spec, source=source, windows=_save_windows(size, work_dir), work_dir=work_dir)


def _save_windows(size: Size, folder: Path) -> Path:
    """Write random tokens, and a mask of ones, under the names of a quantizer's job."""
    tokens, windows = _tokens(size, (size.samples, size.seq_len)), folder / "windows.npy"
    np.save(windows, tokens.numpy())
    np.save(folder / "mask.npy", torch.ones_like(tokens, dtype=torch.uint8).numpy())
    return windows


def _tokens(size: Size, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randint(3, size.config["vocab_size"], shape, generator=torch.Generator().manual_seed(1)).int()


def make_model(size: Size, root: Path, device: str) -> Path:
    """Save a random model with Transformers, whose weights preserve the scale of their inputs."""
    config = AutoConfig.for_model(**size.config)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.05)
            elif parameter.dim() > 1:
                parameter.normal_(std=1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
    model.save_pretrained(root)
    del model
    _tokenizer().save(str(root / "tokenizer.json"))
    (root / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return root


def quantize(job: QuantJob, python: Path) -> dict[str, Any]:
    """Run an engine in its own process and return its figures, layer by layer."""
    ends: dict[int, float] = {}

    def observe(progress: Progress) -> None:
        if progress.task == "quantize":
            ends[progress.done] = time.perf_counter()

    started, used = time.perf_counter(), processor_seconds()
    with _watching_gpus(job.spec) as highest:
        worker = run_worker(
            python,
            f"qwen_pipeline.quantization.{job.spec.engine}:quantize_directory",
            job.to_json(),
            log=job.work_dir / "log",
            observe=observe,
            env=worker_environment(job.spec),
        )
    times = [ends[layer] for layer in sorted(ends)]
    per_layer = [after - before for before, after in pairwise(times)]
    rows = list(csv.DictReader(job.quant_log.read_text().splitlines()))
    return {
        **worker.value,
        "seconds": time.perf_counter() - started,
        "processor_seconds": processor_seconds() - used,
        "seconds_between_ends_of_layers": per_layer,
        "seconds_a_layer": sum(per_layer) / len(per_layer),
        "peak_gpu_bytes_of_the_device": highest[0],
        "peak_host_bytes": worker.peak_memory_bytes,
        "loss_sum": sum(float(row["loss"]) for row in rows),
        "solver_seconds_by_module": _solver_seconds(row for row in rows if row["layer"] != "0"),
    }


def _solver_seconds(rows: Iterable[Mapping[str, str]]) -> dict[str, float]:
    """Return the mean seconds of each kind of module; all experts are one kind."""
    of: dict[str, list[float]] = {}
    for row in rows:
        of.setdefault(re.sub(r"\.\d+\.", ".*.", row["module"]), []).append(float(row["time"]))
    return {kind: mean(seconds) for kind, seconds in of.items()}


def compare(first: QuantJob, second: QuantJob) -> dict[str, Any]:
    """Return the names of tensors that differ between two runs."""
    one, other = open_checkpoint(first.packed), open_checkpoint(second.packed)
    return {
        "tensors": len(one),
        "differing": [name for name in one if not torch.equal(one.load(name), other.load(name))],
    }


def warm_up(_: Mapping[str, Any], __: Observe) -> dict[str, Any]:
    """Solve one small layer, so that the solver compiles its kernels; runs in a worker."""
    from qwen_pipeline.quantization.solver import Hessian, solve

    started = time.perf_counter()
    hessian = Hessian(512)
    hessian.add(torch.randn(4096, 512, device="cuda", dtype=torch.bfloat16))
    list(solve({"": torch.randn(256, 512, device="cuda")}, hessian, QuantSpec(group_size=128, device="cuda")))
    return {"seconds": time.perf_counter() - started}


def evaluate_all(spec: Mapping[str, Any], _: Observe) -> dict[str, Any]:
    """Evaluate the reference and both candidates side by side; runs in a worker."""
    from qwen_pipeline.evaluation.logits.streamed import evaluate
    from qwen_pipeline.layerwise.model import ComputeContext

    models, windows = _models(spec)
    on_gpu = spec["device"] == "cuda"
    context = ComputeContext(device=torch.device(spec["device"]), dtype=torch.bfloat16 if on_gpu else torch.float32)
    started = time.perf_counter()
    figures = evaluate(models, windows, reference="reference", compared=list(spec["packed"]), context=context)
    found: dict[str, Any] = {"seconds": time.perf_counter() - started}
    for role, model in figures.items():
        found[role] = {"perplexity": model.perplexity}
        if divergence := model.divergence:
            found[role] |= {
                "kl_mean": divergence.mean,
                "kl_p99_9": divergence.p99_9,
                "top1_agreement": divergence.top1_agreement,
                "relative_output_error_by_layer": model.drift,
            }
    return found


def _models(spec: Mapping[str, Any]) -> tuple[dict[str, Checkpoint], list[torch.Tensor]]:
    """Return the reference and the candidates by name, and held-out windows."""
    from qwen_pipeline.transforms.codes.packed import quantized_checkpoint

    source = open_checkpoint(Path(spec["source"]))
    quantization = QuantSpec(**spec["quant"]).quantization_config("benchmark:0")
    linears = decoder_linears(source)
    models = {"reference": source} | {
        engine: quantized_checkpoint(source, open_checkpoint(Path(packed)), linears, quantization)
        for engine, packed in spec["packed"].items()
    }
    size, generator = Size(**spec["size"]), torch.Generator().manual_seed(2)
    return models, list(torch.randint(3, size.config["vocab_size"], (size.windows, size.seq_len), generator=generator))


def _shown(found: Mapping[str, Any], family: str) -> dict[str, str]:
    """Return the figures of a run by title; only runs on a GPU have the widths of a real model."""
    shown = {"s a layer": f"{found['seconds_a_layer']:.2f}", "s in all": f"{found['seconds']:.1f}"}
    if on_gpu := found["peak_gpu_bytes_of_the_device"]:
        shown[f"min for {DEPTHS[family]} layers"] = f"{DEPTHS[family] * found['seconds_a_layer'] / 60:.1f}"
        shown["GPU GiB"] = f"{on_gpu / 2**30:.2f}"
    else:
        shown["processor s"] = f"{found['processor_seconds']:.1f}"
    return shown | {
        "host GiB": f"{found['peak_host_bytes'] / 2**30:.2f}",
        "sum of losses": f"{found['loss_sum']:.6g}",
    }


def render(results: Mapping[str, Any]) -> str:
    """Return the results as Markdown; steps that were not reached are absent."""
    lines = ["# One decoder layer at a time", "", f"{json.dumps(results['machine'])}", ""]
    lines += [f"Model and text: {json.dumps(results['size'])}. Random weights and tokens.", ""]
    known: dict[str, Any] = {name: found for name, found in results.items() if "seconds_a_layer" in found}
    if known:
        rows = [
            {"loop": name, **_shown(found, results["size"]["config"]["model_type"])} for name, found in known.items()
        ]
        lines += ["## Quantizing", "", markdown(pd.DataFrame(rows)), ""]
    if {"layerwise", "gptqmodel"} <= known.keys():
        ratio = known["layerwise"]["seconds_a_layer"] / known["gptqmodel"]["seconds_a_layer"]
        lines += [f"The layer loop takes **{ratio:.3f}** of the time of GPTQModel's own.", ""]
    if layers := known.get("layerwise", {}).get("layers", [])[1:]:
        means = {part: sum(at["seconds"][part] for at in layers) / len(layers) for part in layers[0]["seconds"]}
        solved = known["layerwise"]["solver_seconds_by_module"]
        lines += [
            f"Seconds of a layer after the first: {_parts(means)}. Of the solver, by module: {_parts(solved)}.",
            "",
        ]
    if found := results.get("evaluation"):
        rows = [[name, f"{found[name]['kl_mean']:.5g}", f"{found[name]['top1_agreement']:.2%}"] for name in known]
        lines += ["## Against full precision", "", table(["loop", "KL", "top-1"], rows), ""]
    for name, found in results.items():
        if "differing" in found:
            said = f"of {found['tensors']} tensors {len(found['differing'])} differ"
            lines += [f"{name[0].upper()}{name[1:]}, a smaller model: {said}.", ""]
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="interpreter that has gptqmodel")
    parser.add_argument("--scratch", type=Path, default=None, help="a directory on the disk to measure")
    parser.add_argument("--family", choices=WIDE, default="qwen2")
    parser.add_argument("--layers", type=int, help="default: two to four")
    parser.add_argument("--gpus", type=int, default=1, help="also run GPTQModel's own loop on this many GPUs")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def _evaluation(size: Size, jobs: Mapping[str, QuantJob], device: Device) -> dict[str, Any]:
    first = next(iter(jobs.values()))
    return {
        "source": str(first.source),
        "packed": {engine: str(job.packed) for engine, job in jobs.items()},
        "quant": first.spec.to_json(),
        "device": device,
        "size": asdict(size),
    }


def _call(python: Path, function: str, spec: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    worker = run_worker(python, f"benchmarks.layerwise:{function}", spec, log=scratch / f"{function}.log")
    return {**worker.value}


def _tokenizer() -> Tokenizer:
    """Return a tokenizer of bytes: loaders require one, but it is not used."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@contextmanager
def _watching_gpus(spec: QuantSpec) -> Generator[list[int]]:
    """Sample the memory in use as the driver counts it, twice a second; of several GPUs the highest."""
    highest, over = [0], threading.Event()
    if spec.device == "cpu":
        yield highest
        return
    visible = worker_environment(spec)["CUDA_VISIBLE_DEVICES"]
    command = ["nvidia-smi", f"--id={visible}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]

    def watch() -> None:
        while not over.wait(0.5):
            used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            highest[0] = max(highest[0], *(int(one) * 2**20 for one in used.split()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield highest
    finally:
        over.set()
        thread.join()


def _machine(device: str) -> dict[str, str]:
    host = describe_machine()
    name = torch.cuda.get_device_name() if device == "cuda" else f"{host['cores']} cores of {host['cpu']}"
    return {"date": datetime.now(UTC).date().isoformat(), "device": name, "torch": torch.__version__}


def _parts(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{part} {value:.2f}" for part, value in seconds.items())


if __name__ == "__main__":
    main()
