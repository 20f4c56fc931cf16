"""``python -m benchmarks.loops``: the layer loop and GPTQModel's own loop on real models, with the same tokens.

The demo's dense base, padded as in the demo, and a mixture of experts made of it (:mod:`benchmarks.upcycled`) are
quantized by both loops with several draws of calibration text. Every layer is a mixture there, since GPTQModel's loop
does not support dense layers beside mixtures. Wall clock depends on other load, so the engine's processor seconds are
counted too. Each figure is printed and written at once. Earlier figures with the same settings are kept, so that draws
can be added.
"""

import argparse
import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import torch
from safetensors.torch import save_file

from benchmarks.machine import describe_machine, processor_seconds
from benchmarks.report import RESULTS, keep, markdown
from benchmarks.upcycled import upcycle
from qwen_pipeline.checkpoint.lazy import CONFIG, SINGLE_SHARD, open_checkpoint
from qwen_pipeline.checkpoint.store.destinations import Directory
from qwen_pipeline.checkpoint.writer import write_bytes
from qwen_pipeline.demo.base import GROUP_SIZE, TENSOR_PARALLEL, build_base
from qwen_pipeline.demo.texts import Texts, write_texts
from qwen_pipeline.evaluation.logits.streamed import evaluate
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.quantization.spec import Device, QuantizerName, QuantSpec, default_device, usable_cores
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.stages.pad import pad
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline.text.bounded_tokenizer import BoundedTokenizer
from qwen_pipeline.text.windows import token_windows
from qwen_pipeline.workers.environments import find_environment

ENGINES: tuple[QuantizerName, ...] = ("layerwise", "gptqmodel")


def compare(
    model: Path, source: Path, spec: QuantSpec, texts: Texts, python: Path | None, windows: int, device: Device
) -> Any:
    """Quantize ``source`` by ``spec``; return its cost, and its distance from ``model`` on ``device``."""
    with tempfile.TemporaryDirectory() as out:
        started, used = time.perf_counter(), processor_seconds()
        artifact = quantize(
            source=source,
            destination=Directory(Path(out) / "quantized"),
            calibration=texts.calibration,
            spec=spec,
            engine=find_environment(spec.environment, python),
        )
        seconds, used = time.perf_counter() - started, processor_seconds() - used
        held_out = token_windows(texts.held_out, BoundedTokenizer(model), windows=windows, seq_len=spec.seq_len)
        figures = evaluate(
            {"full": open_checkpoint(model), "quantized": open_checkpoint(artifact.path)},
            [torch.tensor(window) for window in held_out],
            reference="full",
            compared=["quantized"],
            context=ComputeContext(device=torch.device(device), dtype=torch.float32),
        )
    divergence, result = figures["quantized"].divergence, artifact.manifest.result
    assert divergence is not None
    return {
        "seconds": round(seconds, 1),
        "processor_seconds": round(used, 1),
        "engine_seconds": round(sum(result["seconds"]["engine"].values()) + result["seconds"]["both"], 1),
        "worker_peak_bytes": artifact.manifest.run.peak_memory_bytes,
        "gpu_peak_bytes": result["evidence"]["gpu_peak_bytes"],
        "loss": sum(row["loss"] or float("nan") for row in result["losses"]),
        "kl": divergence.mean,
        "perplexity": figures["quantized"].perplexity,
        "perplexity_full": figures["full"].perplexity,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return model x engine: means over the draws that all engines share."""
    frame = pd.DataFrame(rows)
    whole = frame.groupby(["model", "seed"])["engine"].transform("nunique") == frame["engine"].nunique()
    means = frame[whole].groupby(["model", "engine"], sort=False).mean(numeric_only=True).reset_index()
    return pd.DataFrame(
        {
            "model": means["model"],
            "loop": means["engine"],
            "KL": means["kl"].map("{:.4f}".format),
            "perplexity": means["perplexity"].map("{:.3f}".format),
            "full precision": means["perplexity_full"].map("{:.3f}".format),
            "sum of losses": means["loss"].map("{:.5g}".format),
            "processor s": means["processor_seconds"].round(),
            "wall s": means["seconds"].round(),
            "engine s": means["engine_seconds"].round(),
            "host GiB": (means["worker_peak_bytes"] / 2**30).round(2),
            "GPU GiB": (means["gpu_peak_bytes"] / 2**30).round(2),
        }
    )


def ratios(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return figures of the layer loop over GPTQModel's: mean and standard error over paired draws."""
    shown = {}
    for metric, title in (("kl", "KL"), ("processor_seconds", "processor s")):
        wide = pd.DataFrame(rows).pivot(index=["model", "seed"], columns="engine", values=metric)
        pairs = wide.reindex(columns=ENGINES).dropna()
        ratio = (pairs["layerwise"] / pairs["gptqmodel"]).groupby("model", sort=False).agg(["size", "mean", "sem"])
        shown["draws"] = ratio["size"]
        shown[title] = [f"{mean:.3f} ± {error:.3f}" for mean, error in zip(ratio["mean"], ratio["sem"], strict=True)]
    return pd.DataFrame(shown).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=["dense", "experts"], default=["dense", "experts"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", choices=get_args(Device), default=default_device())
    parser.add_argument("--evaluate-on", choices=get_args(Device), help="in float32; default: the same device")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--samples", type=int, default=24, help="calibration windows")
    parser.add_argument("--windows", type=int, default=32, help="held-out windows")
    parser.add_argument("--layers", type=int, help="only the first ones of the model")
    parser.add_argument("--base", type=Path, help="the demo's base, if it was built before")
    parser.add_argument("--engine-python", type=Path, help="interpreter that has gptqmodel")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "benchmark-loops")
    parser.add_argument("--out", type=Path, default=RESULTS / "loops", help="path without suffix")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    texts = write_texts(options.scratch)
    base = options.base or build_base(options.scratch / "base").path
    base = first_layers(base, options.layers, options.scratch / f"base-{options.layers}") if options.layers else base
    spec = QuantSpec(
        group_size=GROUP_SIZE, samples=options.samples, seq_len=512, threads=options.threads, device=options.device
    )
    settings = {"spec": spec.to_json(), "windows": options.windows, "layers": options.layers}
    for varied in ("engine", "seed"):
        del settings["spec"][varied]
    rows = _known(options.out.with_suffix(".json"), settings)
    done = {(row["model"], row["seed"], row["engine"]) for row in rows}
    for name, model, source in _models(options.models, base, options.scratch):
        for seed, engine in product(options.seeds, options.engines):
            if (name, seed, engine) not in done:
                drawn = replace(spec, engine=engine, seed=seed)
                device = options.evaluate_on or options.device
                found = compare(model, source, drawn, texts, options.engine_python, options.windows, device)
                rows.append({"model": name, "engine": engine, "seed": seed, **found})
                print(json.dumps(rows[-1]), flush=True)
                _write(options.out, rows, spec, settings)
    print(options.out.with_suffix(".md").read_text())


def first_layers(model: Path, layers: int, out: Path) -> Path:
    """Write a model's first layers as a model of its own, unless it is there; return it."""
    if not out.exists():
        whole = open_checkpoint(model)
        in_layer = re.compile(r"model\.layers\.(\d+)\.")
        kept = {n: whole.load(n) for n in whole if not (at := in_layer.match(n)) or int(at[1]) < layers}
        out.mkdir(parents=True)
        config = {**whole.config, "num_hidden_layers": layers}
        if types := whole.config.get("layer_types"):
            config["layer_types"] = types[:layers]
        (out / CONFIG).write_text(json.dumps(config))
        save_file(kept, out / SINGLE_SHARD, {"format": "pt"})
        for relative, file in whole.sidecars.items():
            write_bytes(out / relative, file.read_bytes())
    return out


def _models(names: Sequence[str], dense: Path, scratch: Path) -> Iterator[tuple[str, Path, Path]]:
    """Yield each model's name, its directory, and the directory that is quantized."""
    if "dense" in names:
        out = Directory(scratch / f"{dense.name}-padded")
        padded = pad(
            source=dense, destination=out, spec=PaddingSpec(group_size=GROUP_SIZE, tensor_parallel=TENSOR_PARALLEL)
        )
        yield "dense", dense, padded.path
    if "experts" in names:
        experts = scratch / f"{dense.name}-experts"
        mixture = experts if experts.exists() else upcycle(dense, experts, step=1)
        yield "experts", mixture, mixture


def _known(file: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of ``file``, if it exists.

    Raises:
        SystemExit: The rows were measured with other settings.
    """
    found = json.loads(file.read_text()) if file.exists() else {**settings, "rows": []}
    if differing := [name for name in settings if found.get(name) != settings[name]]:
        raise SystemExit(f"{file} has rows with other {', '.join(differing)}; use the same settings, or another --out.")
    return found["rows"]


def _write(out: Path, rows: Sequence[Mapping[str, Any]], spec: QuantSpec, settings: Mapping[str, Any]) -> None:
    machine, day = describe_machine(), datetime.now(UTC).date().isoformat()
    on = torch.cuda.get_device_name() if spec.device == "cuda" else "the CPU"
    text = f"""# The layer loop beside GPTQModel's own

{day}, {machine["cpu"]}, {machine["cores"]} cores, {spec.threads} threads, on {on}. {spec.bits} bits in groups of
{spec.group_size}, {spec.samples} calibration windows of {spec.seq_len} tokens, the same for both loops; means over
draws of calibration text. Engine seconds are those of importing, loading, quantizing and saving.

{markdown(table(rows))}

Layer loop over GPTQModel's own loop, mean and standard error over paired draws:

{markdown(ratios(rows))}
"""
    found = {"date": day, "machine": machine, **settings, "rows": list(rows)}
    keep(out, text, found)


if __name__ == "__main__":
    main()
