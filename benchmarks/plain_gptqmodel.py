"""A plain GPTQModel script without this package: load, quantize, save.

``python benchmarks/plain_gptqmodel.py JOB.json``, with a Python that has gptqmodel; :mod:`benchmarks.overhead` runs it.
"""

import json
import sys
from pathlib import Path

import torch
from gptqmodel import GPTQConfig, GPTQModel  # pyright: ignore[reportMissingImports]

job = json.loads(Path(sys.argv[1]).read_text())
torch.set_num_threads(job["threads"])
config = GPTQConfig(**job["config"], fallback=None)
model = GPTQModel.load(job["source"], config, device="cpu", dtype=torch.float32)
rows = [torch.tensor(row) for row in job["windows"]]
windows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
model.quantize(windows, batch_size=job["batch_size"], calibration_sort=None)
model.save(job["out"])
