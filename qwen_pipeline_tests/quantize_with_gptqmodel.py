"""Quantize SOURCE into OUT with GPTQModel on a CPU, with SETTINGS of its ``QuantizeConfig`` in JSON."""

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    source, out, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    out.parent.mkdir(parents=True, exist_ok=True)
    os.chdir(out.parent)  # the library writes ./logs
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
    library: Any = import_module("gptqmodel")
    is_awq = settings.get("quant_method") == "awq"
    dtype = torch.bfloat16 if is_awq else torch.float32
    model = library.GPTQModel.load(source, library.QuantizeConfig(**settings), device="cpu", dtype=dtype)
    windows = torch.randint(0, 256, (16, 64), generator=torch.Generator().manual_seed(0))
    backend = {"backend": library.BACKEND.AWQ_TORCH} if is_awq else {}
    batches = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows]
    model.quantize(batches, batch_size=4, calibration_sort=None, **backend)
    model.save(str(out))


if __name__ == "__main__":
    main()
