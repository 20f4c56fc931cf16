"""Quantized checkpoints in the formats of GPTQModel, made by the library itself from a tiny model."""

import json
import subprocess
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qwen_pipeline.progress import Observe
from qwen_pipeline.qwen.families import number_of_experts
from qwen_pipeline.workers.environments import find_environment
from qwen_pipeline.workers.parent import run_worker
from qwen_pipeline_tests import REPOSITORY
from qwen_pipeline_tests.whole import load_model


def quantized_by_gptqmodel(source: Path, out: Path, **settings: Any) -> Path:
    """Quantize ``source`` into ``out`` with ``settings`` of GPTQModel's ``QuantizeConfig``; return ``out``."""
    command = [
        find_environment("gptqmodel").python,
        "-m",
        "qwen_pipeline_tests.quantize_with_gptqmodel",
        source.resolve(),
        out.resolve(),
    ]
    done = subprocess.run(
        [*map(str, command), json.dumps(settings)], cwd=REPOSITORY, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def logits_of(*roots: Path) -> list[torch.Tensor]:
    """Return the logits of checkpoints for one fixed sequence, loaded in GPTQModel's environment.

    GPTQ is loaded as in validation, with every tensor accounted for; AWQ and mixtures of experts are loaded by
    GPTQModel, which has a kernel for AWQ and supports the layout of the experts.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits.safetensors"
        job = {"roots": [str(root.resolve()) for root in roots], "out": str(out)}
        run_worker(
            find_environment("gptqmodel").python, f"{__name__}:save_logits", job, log=Path(scratch) / "worker.log"
        )
        logits = load_file(out)
    return [logits[str(number)] for number in range(len(roots))]


@torch.inference_mode()
def save_logits(job: Mapping[str, Any], _: Observe) -> Mapping[str, Any]:
    ids = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(7))
    models = [_load(root) for root in job["roots"]]
    save_file({str(number): model(input_ids=ids).logits.float() for number, model in enumerate(models)}, job["out"])
    return {}


def _load(root: str) -> Any:
    config = json.loads((Path(root) / "config.json").read_bytes())
    if "quantization_config" not in config:
        return load_model(root)
    is_gptq = config["quantization_config"]["quant_method"] == "gptq"
    if is_gptq and not number_of_experts(config):
        return load_model(root)
    library: Any = import_module("gptqmodel")
    backend = library.BACKEND.GPTQ_TORCH if is_gptq else library.BACKEND.AWQ_TORCH
    return library.GPTQModel.load(root, backend=backend, device="cpu")
