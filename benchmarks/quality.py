"""``python -m benchmarks.quality``: how far a quantized model is from full precision, by recipe, for the same bits.

KL(full precision || quantized) on held-out text of the calibration's kind and on text of other kinds, for each draw of
calibration text, group size and recipe, beside GPTQModel's own loop with its defaults. Ratios to the recipe ``gptq``
are computed draw by draw. Each row is written at once, and an interrupted run resumes.

The model is the demo's base unless ``--model`` names another; ``--text`` names texts of other kinds. On a GPU
(``--device cuda``) nothing is downloaded if ``--model`` is given.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, cast, get_args

import pandas as pd
import torch

from benchmarks.machine import describe_machine, processor_seconds
from benchmarks.report import RESULTS, keep, markdown
from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.store.destinations import Directory
from qwen_pipeline.checkpoint.writer import write_bytes
from qwen_pipeline.demo.base import build_base
from qwen_pipeline.demo.texts import write_texts
from qwen_pipeline.evaluation.logits.streamed import evaluate
from qwen_pipeline.evaluation.structure.check import check_structure
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.quantization.recipes import RECIPES, RecipeName
from qwen_pipeline.quantization.spec import Device, QuantSpec, default_device, usable_cores
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline.text.tokenizers import load_tokenizer
from qwen_pipeline.text.windows import token_windows
from qwen_pipeline.workers.environments import find_environment

PEER = "GPTQModel"
"""GPTQModel's own loop with its default settings."""
SOURCES = ("argparse", "asyncio.base_events", "decimal", "difflib", "doctest", "inspect", "tarfile", "turtle")
"""Modules of CPython whose source is text of another kind than its documentation."""


class Benchmark:
    """The rows of one set of settings; those in the journal were measured by an earlier run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options, self._model = options, options.model or build_base(options.scratch / "base").path
        texts = write_texts(options.scratch)
        self._calibration = options.calibration or texts.calibration
        held_out = options.held_out or texts.held_out
        others = options.text or [f"code={write_code(options.scratch / 'code.jsonl')}"]
        self._texts = {"held-out": held_out} | {
            name: Path(file) for name, _, file in (each.partition("=") for each in others)
        }
        name = f"rows-{self._model.name}-{options.samples}-{options.windows}-{options.seq_len}-{options.device}.jsonl"
        self._journal = options.scratch / name
        lines = self._journal.read_text().splitlines() if self._journal.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def run(self) -> Iterator[Mapping[str, Any]]:
        """Measure and yield the rows that are missing."""
        options = self._options
        done = {(row["seed"], row["group_size"], row["recipe"]) for row in self.rows}
        for seed, group_size in product(options.seeds, options.group_sizes):
            missing = [name for name in options.recipes if (seed, group_size, name) not in done]
            with tempfile.TemporaryDirectory(dir=options.scratch) as out:
                costs = {name: self._quantize(name, seed, group_size, Path(out) / name) for name in missing}
                figures = self._evaluate({name: Path(out) / name for name in missing}) if missing else {}
            for name in missing:
                row = {"seed": seed, "group_size": group_size, "recipe": name, **costs[name], **figures[name]}
                self.rows.append(row)
                with self._journal.open("a") as file:
                    print(json.dumps(row), file=file)
                yield row

    def _quantize(self, name: str, seed: int, group_size: int, out: Path) -> dict[str, Any]:
        options = self._options
        spec = QuantSpec(
            engine="gptqmodel" if name == PEER else "layerwise",
            recipe="gptq" if name == PEER else cast("RecipeName", name),
            group_size=group_size,
            samples=options.samples,
            seq_len=options.seq_len,
            seed=seed,
            device=options.device,
            threads=options.threads,
        )
        started, used = time.perf_counter(), processor_seconds()
        artifact = quantize(
            source=self._model,
            destination=Directory(out),
            calibration=self._calibration,
            spec=spec,
            engine=find_environment(spec.environment, options.engine_python),
        )
        result = artifact.manifest.result
        structure = check_structure(open_checkpoint(self._model), open_checkpoint(artifact.path))
        return {
            "seconds": round(time.perf_counter() - started, 1),
            "processor_seconds": round(processor_seconds() - used, 1),
            "host_peak_bytes": artifact.manifest.run.peak_memory_bytes,
            "gpu_peak_bytes": result["evidence"]["gpu_peak_bytes"],
            "failed": [check["name"] for check in result["checks"] if not check["passed"] and not check["skipped"]],
            "structure": list(structure.problems),
            "errors": [layer.get("errors", {}) for layer in result["layers"]],
        }

    def _evaluate(self, quantized: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
        options, tokenizer = self._options, load_tokenizer(self._model)
        found: dict[str, dict[str, Any]] = {name: {} for name in quantized}
        for text, file in self._texts.items():
            windows = token_windows(file, tokenizer, windows=options.windows, seq_len=options.seq_len)
            figures = evaluate(
                {"full": open_checkpoint(self._model)} | {name: open_checkpoint(at) for name, at in quantized.items()},
                [torch.tensor(window) for window in windows],
                reference="full",
                compared=list(quantized),
                context=ComputeContext(device=torch.device(options.device), dtype=torch.float32),
            )
            for name in quantized:
                divergence = figures[name].divergence
                assert divergence is not None
                found[name][text] = {
                    "kl": divergence.mean,
                    "p95": divergence.p95,
                    "p99_9": divergence.p99_9,
                    "top1": divergence.top1_agreement,
                    "perplexity": figures[name].perplexity,
                    "perplexity_full": figures["full"].perplexity,
                }
        return found

    @property
    def texts(self) -> list[str]:
        return list(self._texts)


def write_code(out: Path) -> Path:
    """Write the source of :data:`SOURCES` as JSONL; the same version of CPython gives the same bytes."""
    from importlib.util import find_spec

    specs = [find_spec(name) for name in SOURCES]
    texts = [Path(spec.origin).read_text() for spec in specs if spec and spec.origin]
    write_bytes(out, "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    return out


def table(rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> pd.DataFrame:
    """Return group size x recipe: the mean KL on each text and its ratio to ``gptq``'s, seconds and memory.

    A ratio is the mean over the draws that both have, with its standard error.
    """
    by_draw = {(row["group_size"], row["recipe"], row["seed"]): row for row in rows}
    shown: list[dict[str, Any]] = []
    for group_size, recipe in dict.fromkeys((row["group_size"], row["recipe"]) for row in rows):
        own = [row for row in rows if (row["group_size"], row["recipe"]) == (group_size, recipe)]
        line: dict[str, Any] = {"groups of": group_size, "recipe": recipe, "draws": len(own)}
        for text in texts:
            pairs = [(row, by_draw.get((group_size, "gptq", row["seed"]))) for row in own]
            ratios = [row[text]["kl"] / plain[text]["kl"] for row, plain in pairs if plain]
            line[text] = f"{mean(row[text]['kl'] for row in own):.4f}{_ratio(ratios)}"
        line["perplexity"] = f"{mean(row[texts[0]]['perplexity'] for row in own):.3f}"
        for name, title in (("seconds", "wall s"), ("processor_seconds", "processor s")):
            line[title] = round(mean(row[name] for row in own))
        for name, title in (("host_peak_bytes", "host GiB"), ("gpu_peak_bytes", "GPU GiB")):
            line[title] = f"{mean(row[name] for row in own) / 2**30:.2f}"
        shown.append(line)
    return pd.DataFrame(shown)


def _ratio(ratios: Sequence[float]) -> str:
    if not ratios:
        return ""
    error = f" ± {stdev(ratios) / len(ratios) ** 0.5:.3f}" if len(ratios) > 1 else ""
    return f", {mean(ratios):.3f}{error}"


def write_results(benchmark: Benchmark, options: argparse.Namespace) -> str:
    """Write all rows and their table to ``--json``, and next to it with the suffix ``.md``."""
    machine, day = describe_machine(), datetime.now(UTC).date().isoformat()
    device = (
        torch.cuda.get_device_name() if options.device == "cuda" else f"{machine['cpu']}, {options.threads} threads"
    )
    text = f"""# KL(full precision || quantized), nats per token, by recipe

{day}, {device}. 4 bits; calibration {options.samples} x {options.seq_len} tokens, evaluation {options.windows} x
{options.seq_len} tokens of each text. Each cell: mean KL, and the mean ± standard error over draws of calibration text
of its ratio to the recipe `gptq`; perplexity is that of the first text.

{markdown(table(benchmark.rows, benchmark.texts))}
"""
    settings = {name: getattr(options, name) for name in ("samples", "windows", "seq_len", "device", "threads")}
    found = {"date": day, "machine": machine, "device": device, "settings": settings, "rows": benchmark.rows}
    keep(options.json.with_suffix(""), text, found)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="+", choices=[PEER, *RECIPES], default=[PEER, "gptq", "fast"])
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[64, 32])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="draws of calibration text")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--windows", type=int, default=8, help="windows of each text for evaluation")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--device", choices=get_args(Device), default=default_device())
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--model", type=Path, help="a full-precision model; default: the demo's base")
    parser.add_argument("--calibration", type=Path, help="calibration text; default: the demo's")
    parser.add_argument("--held-out", type=Path, help="text of the same kind; default: the demo's")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="repeatable; default: code")
    parser.add_argument("--engine-python", type=Path, help="interpreter that has gptqmodel")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "benchmark-quality")
    parser.add_argument("--json", type=Path, default=RESULTS / "quality.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.scratch.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(options)
    for row in benchmark.run():
        print(json.dumps(row), flush=True)
        write_results(benchmark, options)
    print(write_results(benchmark, options))


if __name__ == "__main__":
    main()
