"""Quantized checkpoints as people have them: made by the real GPTQModel from a tiny model, in every format it writes."""

import json
import subprocess
from pathlib import Path
from typing import Any

from qwen_pipeline.engines.environment import find_environment

_QUANTIZE = """
import json, os, sys, torch
source, out, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
os.makedirs(os.path.dirname(out), exist_ok=True)
os.chdir(os.path.dirname(out))
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
is_awq = settings.get("quant_method") == "awq"
dtype = torch.bfloat16 if is_awq else torch.float32
model = GPTQModel.load(source, QuantizeConfig(**settings), device="cpu", dtype=dtype)
windows = torch.randint(0, 256, (16, 64), generator=torch.Generator().manual_seed(0))
model.quantize(
    [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows],
    batch_size=4, calibration_sort=None, **({"backend": BACKEND.AWQ_TORCH} if is_awq else {}),
)
model.save(out)
"""


def quantized_by_gptqmodel(source: Path, out: Path, **settings: Any) -> Path:
    """Quantize ``source`` into ``out`` with ``settings`` of GPTQModel's ``QuantizeConfig``; return ``out``."""
    command = [find_environment("gptqmodel").python, "-c", _QUANTIZE, source.resolve(), out.resolve()]
    done = subprocess.run([*map(str, command), json.dumps(settings)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out
