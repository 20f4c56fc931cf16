"""One decoder layer at a time, at 72B widths: the layer loop beside GPTQModel's own.

``python -m benchmarks.layerwise OUT`` makes a random Qwen2 of ``--layers`` in a scratch directory, quantizes it twice
with the same calibration tokens, in a process each, then evaluates reference and candidates together. It needs a CUDA
device, gptqmodel in the environment of ``--python`` (by default this one), 20 GB of disk and about six minutes; what is
known is written at once. ``--tiny`` does the same with a toy on the CPU, to see that it runs.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.report import table
from qwen_pipeline.checkpoint.dtypes import DTYPE_NAMES
from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec, header_bytes
from qwen_pipeline.engines.protocol import QuantJob, QuantSpec
from qwen_pipeline.progress import Observe, Progress
from qwen_pipeline.qwen.linears import decoder_linears
from qwen_pipeline.workers.parent import run_worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A Qwen2 and how much text goes through it."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int
    samples: int
    seq_len: int
    batch: int
    windows: int
    group_size: int

    @property
    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-06,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "dtype": "bfloat16",
        }

    def shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """Return tensors shard by shard: each layer, then the ends."""
        key_width = self.hidden // self.heads * self.kv_heads
        shards: list[dict[str, tuple[int, ...]]] = []
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            shard: dict[str, tuple[int, ...]] = {
                f"{at}input_layernorm.weight": (self.hidden,),
                f"{at}post_attention_layernorm.weight": (self.hidden,),
                f"{at}self_attn.o_proj.weight": (self.hidden, self.hidden),
                f"{at}mlp.gate_proj.weight": (self.mlp, self.hidden),
                f"{at}mlp.up_proj.weight": (self.mlp, self.hidden),
                f"{at}mlp.down_proj.weight": (self.hidden, self.mlp),
            }
            for name, width in (("q", self.hidden), ("k", key_width), ("v", key_width)):
                shard |= {
                    f"{at}self_attn.{name}_proj.weight": (width, self.hidden),
                    f"{at}self_attn.{name}_proj.bias": (width,),
                }
            shards.append(shard)
        ends = (self.vocabulary, self.hidden)
        return [
            *shards,
            {"model.embed_tokens.weight": ends, "model.norm.weight": (self.hidden,), "lm_head.weight": ends},
        ]


WIDE = Size(
    hidden=8192, mlp=29696, heads=64, kv_heads=8, layers=4, vocabulary=32768, samples=128, seq_len=2048, batch=8,
    windows=8, group_size=128,
)  # fmt: skip
SMALL = Size(
    hidden=1024, mlp=2944, heads=16, kv_heads=4, layers=2, vocabulary=4096, samples=16, seq_len=512, batch=8, windows=4,
    group_size=128,
)  # fmt: skip
TINY = Size(
    hidden=128, mlp=384, heads=4, kv_heads=2, layers=2, vocabulary=512, samples=16, seq_len=64, batch=8, windows=4,
    group_size=32,
)  # fmt: skip


def main() -> None:
    """Run everything; write ``layerwise.json`` and ``layerwise.md`` into the directory given, after every step."""
    arguments = _arguments()
    size, device = (TINY, "cpu") if arguments.tiny else (replace(WIDE, layers=arguments.layers), "cuda")
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
        spec = QuantSpec(
            group_size=size.group_size, samples=size.samples, seq_len=size.seq_len, batch_size=size.batch,
            device="cuda" if device == "cuda" else "cpu",
        )  # fmt: skip
        windows = _save_windows(size, scratch)
        jobs: dict[str, QuantJob] = {}
        for engine in ("layerwise", "gptqmodel"):
            jobs[engine] = QuantJob(
                spec=replace(spec, engine=engine), source=source, windows=windows, workshop=scratch / engine
            )
            note(engine, quantize(jobs[engine], arguments.python, device))
        evaluation = _evaluation(size, jobs, device)
        note("evaluation", _call(arguments.python, "evaluate_all", evaluation, scratch))
        twice = {"size": asdict(TINY if arguments.tiny else SMALL), "device": device}
        note("two equal runs", _call(arguments.python, "quantize_twice", twice, scratch))


def _save_windows(size: Size, folder: Path) -> Path:
    """Write random tokens, and a mask that lets all of them count, as a quantizer's job names them."""
    tokens, windows = _tokens(size, (size.samples, size.seq_len)), folder / "windows.npy"
    np.save(windows, tokens.numpy())
    np.save(folder / "mask.npy", torch.ones_like(tokens, dtype=torch.uint8).numpy())
    return windows


def _tokens(size: Size, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randint(3, size.vocabulary, shape, generator=torch.Generator().manual_seed(1)).int()


def make_model(size: Size, root: Path, device: str) -> Path:
    """Write a random checkpoint: norms of one, weights that keep the scale of what they are given."""
    root.mkdir()
    (root / "config.json").write_text(json.dumps(size.config))
    _tokenizer().save(str(root / "tokenizer.json"))
    (root / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    generator = torch.Generator(device).manual_seed(0)
    owners: dict[str, str] = {}
    for number, shard in enumerate(size.shapes(), start=1):
        file = f"model-{number:05d}.safetensors"
        owners |= dict.fromkeys(shard, file)
        with (root / file).open("wb") as out:
            dtype = DTYPE_NAMES[torch.bfloat16]
            out.write(header_bytes({name: TensorSpec(dtype=dtype, shape=shape) for name, shape in shard.items()}))
            for name, shape in shard.items():
                if name.endswith("norm.weight"):
                    tensor = torch.ones(shape, dtype=torch.bfloat16)
                else:
                    scale = 1.0 if "embed" in name else 0.05 if name.endswith("bias") else shape[-1] ** -0.5
                    tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
                    tensor = tensor.normal_(std=scale, generator=generator).cpu()
                out.write(tensor.view(torch.uint8).numpy().data)
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": owners}))
    return root


def quantize(job: QuantJob, python: Path, device: str) -> dict[str, Any]:
    """Run an engine in its own process and return what it took, layer by layer."""
    job.workshop.mkdir()
    ends: dict[int, float] = {}

    def observe(progress: Progress) -> None:
        if progress.task == "quantize":
            ends[progress.done] = time.perf_counter()

    started = time.perf_counter()
    with _watching_gpu(device) as highest:
        worker = run_worker(
            python,
            f"qwen_pipeline.engines.{job.spec.engine}:quantize_directory",
            job.to_json(),
            log=job.workshop / "log",
            observe=observe,
        )
    times = [ends[layer] for layer in sorted(ends)]
    per_layer = [after - before for before, after in pairwise(times)]
    rows = list(csv.DictReader(job.quant_log.read_text().splitlines()))
    return {
        **worker.value,
        "seconds": time.perf_counter() - started,
        "seconds_between_ends_of_layers": per_layer,
        "seconds_a_layer": sum(per_layer) / len(per_layer),
        "peak_gpu_bytes_of_the_device": highest[0],
        "peak_host_bytes": worker.peak_memory_bytes,
        "loss_sum": sum(float(row["loss"]) for row in rows),
        "solver_seconds_by_module": {
            kind: mean(float(row["time"]) for row in rows if row["module"] == kind and row["layer"] != "0")
            for kind in dict.fromkeys(row["module"] for row in rows)
        },
    }


def warm_up(_: Mapping[str, Any], __: Observe) -> dict[str, Any]:
    """Solve one small layer, for the kernels that the solver compiles at first use; runs in a worker."""
    from qwen_pipeline.engines.solver import Hessian, solve

    started = time.perf_counter()
    hessian = Hessian(512)
    hessian.add(torch.randn(4096, 512, device="cuda", dtype=torch.bfloat16))
    list(solve({"": torch.randn(256, 512, device="cuda")}, hessian, QuantSpec(group_size=128, device="cuda")))
    return {"seconds": time.perf_counter() - started}


def evaluate_all(spec: Mapping[str, Any], _: Observe) -> dict[str, Any]:
    """Evaluate the reference and both candidates side by side; runs in a worker."""
    from qwen_pipeline.evaluation.streamed import evaluate
    from qwen_pipeline.layerwise.model import Place

    models, windows = _models(spec)
    place = Place(device=torch.device(spec["device"]), dtype=torch.bfloat16)
    started = time.perf_counter()
    figures = evaluate(models, windows, reference="reference", compared=list(spec["packed"]), place=place)
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


def quantize_twice(spec: Mapping[str, Any], observe: Observe) -> dict[str, Any]:
    """Quantize a small model twice in the layer loop and compare the bytes; runs in a worker."""
    from qwen_pipeline.engines import layerwise

    size, started = Size(**spec["size"]), time.perf_counter()
    digests: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        source = make_model(size, Path(folder) / "model", spec["device"])
        windows = _save_windows(size, Path(folder))
        quant = QuantSpec(
            engine="layerwise", group_size=size.group_size, samples=size.samples, seq_len=size.seq_len,
            batch_size=size.batch, device=spec["device"],
        )  # fmt: skip
        for run in ("first", "second"):
            job = QuantJob(spec=quant, source=source, windows=windows, workshop=Path(folder) / run)
            layerwise.quantize_directory(job.to_json(), observe)
            packed = open_checkpoint(job.packed)
            digests.append({name: sha256(packed.load(name).numpy().tobytes()).hexdigest() for name in packed})
    first, second = digests
    differing = [name for name in first if first[name] != second[name]]
    return {"seconds": time.perf_counter() - started, "tensors": len(first), "differing": differing}


def _models(spec: Mapping[str, Any]) -> tuple[dict[str, Checkpoint], list[torch.Tensor]]:
    """Return the reference and the candidates by name, and windows that calibration has not seen."""
    from qwen_pipeline.transforms.packed import quantized_checkpoint

    source = open_checkpoint(Path(spec["source"]))
    quantization = QuantSpec(**spec["quant"]).quantization_config("benchmark:0")
    linears = decoder_linears(source)
    models = {"reference": source} | {
        engine: quantized_checkpoint(source, open_checkpoint(Path(packed)), linears, quantization)
        for engine, packed in spec["packed"].items()
    }
    size, generator = Size(**spec["size"]), torch.Generator().manual_seed(2)
    return models, list(torch.randint(3, size.vocabulary, (size.windows, size.seq_len), generator=generator))


def render(results: Mapping[str, Any]) -> str:
    """Return the results as Markdown; steps that were not reached are absent."""
    lines = ["# One decoder layer at a time", "", f"{json.dumps(results['machine'])}", ""]
    lines += [f"Model and text: {json.dumps(results['size'])}. Random weights and tokens.", ""]
    engines = [engine for engine in ("gptqmodel", "layerwise") if engine in results]
    if engines:
        rows = [
            [
                engine, f"{found['seconds_a_layer']:.2f}", f"{found['seconds']:.1f}",
                f"{80 * found['seconds_a_layer'] / 60:.1f}", _gib(found["peak_gpu_bytes_of_the_device"]),
                _gib(found["peak_host_bytes"]), f"{found['loss_sum']:.6g}",
            ]
            for engine in engines
            for found in [results[engine]]
        ]  # fmt: skip
        head = ["loop", "s a layer", "s in all", "min for 80 layers", "GPU GiB", "host GiB", "sum of losses"]
        lines += ["## Quantizing", "", table(head, rows), ""]
    if len(engines) == 2:
        ratio = results["layerwise"]["seconds_a_layer"] / results["gptqmodel"]["seconds_a_layer"]
        lines += [f"The layer loop takes **{ratio:.3f}** of the time of GPTQModel's own (bar: 0.4).", ""]
    if layers := results.get("layerwise", {}).get("layers", [])[1:]:
        means = {part: sum(at["seconds"][part] for at in layers) / len(layers) for part in layers[0]["seconds"]}
        solved = results["layerwise"]["solver_seconds_by_module"]
        lines += [
            f"Seconds of a layer after the first: {_parts(means)}. Of the solver, by module: {_parts(solved)}.",
            "",
        ]
    if found := results.get("evaluation"):
        rows = [
            [engine, f"{found[engine]['kl_mean']:.5g}", f"{found[engine]['top1_agreement']:.2%}"] for engine in engines
        ]
        lines += ["## Against full precision", "", table(["loop", "KL", "top-1"], rows), ""]
    if found := results.get("two equal runs"):
        lines += [
            f"Two equal runs of the layer loop on a small model: of {found['tensors']} tensors"
            f" {len(found['differing'])} differ.",
            "",
        ]
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="has gptqmodel")
    parser.add_argument("--scratch", type=Path, default=None, help="a directory on the disk to measure")
    parser.add_argument("--layers", type=int, default=WIDE.layers)
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def _evaluation(size: Size, jobs: Mapping[str, QuantJob], device: str) -> dict[str, Any]:
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
    """Bytes as tokens: loaders want a tokenizer, nobody uses it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@contextmanager
def _watching_gpu(device: str) -> Generator[list[int]]:
    """Follow the memory in use on the device, every half second, as the driver counts it."""
    highest, over = [0], threading.Event()

    def watch() -> None:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not over.wait(0.5):
            used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            highest[0] = max(highest[0], int(used.split()[0]) * 2**20)

    thread = threading.Thread(target=watch)
    if device == "cuda":
        thread.start()
    try:
        yield highest
    finally:
        over.set()
        if device == "cuda":
            thread.join()


def _machine(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {"date": datetime.now(UTC).date().isoformat(), "device": name, "torch": torch.__version__}


def _parts(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{part} {value:.2f}" for part, value in seconds.items())


def _gib(nbytes: int | None) -> str:
    return f"{nbytes / 2**30:.2f}" if nbytes else ""


if __name__ == "__main__":
    main()
