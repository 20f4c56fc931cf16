"""Other quantizers as plain scripts without this package: ``python peers.py JOB.json`` in an environment of their own.

The job names the model, a ``.npy`` file of calibration tokens, the output, bits, group size, device, and the library's
options; it is the same for all. Figures of the run are written to the job's ``figures``.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch


def gptqmodel(job: Mapping[str, Any], windows: torch.Tensor) -> None:
    """Quantize by GPTQModel's own loop."""
    library: Any = import_module("gptqmodel")
    config = library.GPTQConfig(bits=job["bits"], group_size=job["group_size"], fallback=None, **job["options"])
    dtype = torch.float32 if job["device"] == "cpu" else "auto"
    model = library.GPTQModel.load(job["source"], config, device=job["device"], dtype=dtype)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows]
    model.quantize(rows, batch_size=8, calibration_sort=None)
    model.save(job["out"])


def auto_round(job: Mapping[str, Any], windows: torch.Tensor) -> None:
    """Quantize by AutoRound, symmetric, and save in GPTQ's format."""
    library: Any = import_module("auto_round")
    model, tokenizer = _model(job)
    quantizer = library.AutoRound(
        model,
        tokenizer,
        scheme={"bits": job["bits"], "group_size": job["group_size"], "sym": True, "data_type": "int", "act_bits": 16},
        dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in windows],
        seqlen=windows.shape[1],
        nsamples=len(windows),
        batch_size=8,
        device_map=job["device"],
        **job["options"],
    )
    quantizer.quantize_and_save(job["out"], format="auto_gptq")


def llm_compressor(job: Mapping[str, Any], windows: torch.Tensor) -> None:
    """Quantize by llm-compressor's GPTQ or AWQ, symmetric, and save as compressed-tensors."""
    datasets: Any = import_module("datasets")
    library: Any = import_module("llmcompressor")
    modifiers: Any = import_module("llmcompressor.modifiers.quantization")
    options = dict(job["options"])
    weights = {"num_bits": job["bits"], "type": "int", "symmetric": True, "strategy": "group"}
    weights |= {"group_size": job["group_size"], **options.pop("weights", {})}
    settings = {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    if options.pop("method") == "gptq":
        recipe = [modifiers.GPTQModifier(**settings, **options)]
    else:
        awq: Any = import_module("llmcompressor.modifiers.transform.awq")
        recipe = [awq.AWQModifier(**options), modifiers.QuantizationModifier(**settings)]
    model, tokenizer = _model(job)
    rows = {"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}
    library.oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=datasets.Dataset.from_dict(rows),
        recipe=recipe,
        max_seq_length=windows.shape[1],
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
        batch_size=8,
        pipeline="sequential",
    )
    model.save_pretrained(job["out"], save_compressed=True)


def layerwise(job: Mapping[str, Any], windows: torch.Tensor) -> None:
    """Quantize by this package's layer loop with a recipe of other settings; only the codes are written."""
    recipes: Any = import_module("qwen_pipeline.quantization.recipes")
    jobs: Any = import_module("qwen_pipeline.quantization.job")
    specs: Any = import_module("qwen_pipeline.quantization.spec")
    kinds = {
        "scale_search": recipes.ScaleSearch,
        "target_correction": recipes.TargetCorrection,
        "learned_rounding": recipes.LearnedRounding,
    }
    options = dict(job["options"])
    steps = {name: kinds[name](**options.pop(name)) for name in list(options) if name in kinds}
    recipes.RECIPES["fast"] = replace(recipes.RECIPES["fast"], **steps)
    samples, seq_len = windows.shape
    sizes = {name: job[name] for name in ("bits", "group_size", "device", "threads", "seed")}
    spec = specs.QuantSpec(recipe="fast", samples=samples, seq_len=seq_len, **sizes, **options)
    folder = Path(job["out"])
    folder.mkdir()
    np.save(folder / "windows.npy", windows.int().numpy())
    np.save(folder / "mask.npy", torch.ones_like(windows, dtype=torch.uint8).numpy())
    own = jobs.QuantJob(spec=spec, source=Path(job["source"]), windows=folder / "windows.npy", work_dir=folder)
    result = import_module("qwen_pipeline.quantization.layerwise").quantize_directory(own.to_json(), print)
    (folder / "layers.json").write_text(json.dumps(result["layers"]))


LIBRARIES: Mapping[str, Callable[[Mapping[str, Any], torch.Tensor], None]] = {
    "layerwise": layerwise,
    "gptqmodel": gptqmodel,
    "auto-round": auto_round,
    "llm-compressor": llm_compressor,
}

MODULES = {
    "layerwise": "gptqmodel",
    "gptqmodel": "gptqmodel",
    "auto-round": "auto_round",
    "llm-compressor": "llmcompressor",
}


def _model(job: Mapping[str, Any]) -> tuple[Any, Any]:
    transformers: Any = import_module("transformers")
    dtype = torch.float32 if job["device"] == "cpu" else "auto"
    model = transformers.AutoModelForCausalLM.from_pretrained(job["source"], dtype=dtype)
    return model.to(job["device"]), transformers.AutoTokenizer.from_pretrained(job["source"])


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(max(2, (job["threads"] + 1) // 2))  # its loader cannot start with one
    import_module(MODULES[job["library"]])  # its seconds do not count
    windows, started = torch.from_numpy(np.load(job["windows"])).long(), time.perf_counter()
    LIBRARIES[job["library"]](job, windows)
    on_gpu = torch.cuda.max_memory_allocated() if job["device"] == "cuda" else 0
    figures = {
        "engine_seconds": time.perf_counter() - started,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "gpu_peak_bytes": on_gpu,
    }
    Path(job["figures"]).write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
