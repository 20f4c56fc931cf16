"""A merge's memory is some blocks, however large the tensor: also where DoRA needs all rows first, and for stacks."""

import subprocess
import sys
from pathlib import Path

import pytest

from qwen_pipeline_tests import REPOSITORY

RISE = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.checkpoint.measure import resident_peak
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.checkpoint.writer import write_checkpoint
from qwen_pipeline.transforms.lora.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, open_adapter
from qwen_pipeline.transforms.lora.adapter_set import single
from qwen_pipeline.transforms.lora.merge import merge_lora

HIDDEN, WIDTH = 1024, 256
EMBEDDING, HEAD, MLP = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.experts"

def ones(*shape):
    spec = TensorSpec(dtype="BF16", shape=shape)
    return LazyTensor(spec=spec, read=lambda start, stop: torch.ones(stop - start, *shape[1:], dtype=torch.bfloat16))

def merge(root, name, base, factors, settings):
    root.mkdir(parents=True)
    save_file({f"base_model.model.{key}": torch.ones(shape) for key, shape in factors.items()}, root / ADAPTER_WEIGHTS)
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, **settings}
    (root / ADAPTER_CONFIG).write_text(json.dumps(settings))
    config = {"model_type": "qwen3_moe", "hidden_size": HIDDEN, "num_experts": 8}
    shards = dict.fromkeys(base, "model.safetensors")
    merged = merge_lora(Checkpoint(config=config, tensors=base, shards=shards), single(open_adapter(root))).checkpoint
    only = Checkpoint(config=config, tensors={name: merged.tensors[name]}, shards={name: "model.safetensors"})
    write_checkpoint(only, root, task="")
    (root / "model.safetensors").unlink()

def dora(root, rows):
    base = {EMBEDDING: ones(rows, HIDDEN), HEAD: ones(rows, HIDDEN)}
    factors = {"lora_embedding_A": (1, rows), "lora_embedding_B": (HIDDEN, 1), "lora_magnitude_vector": (HIDDEN,)}
    factors = {f"model.embed_tokens.{part}": shape for part, shape in factors.items()}
    merge(root, EMBEDDING, base, factors, {"use_dora": True})

def experts(root, count, transposed=False):
    stack = ones(count, HIDDEN, 2 * WIDTH) if transposed else ones(count, 2 * WIDTH, HIDDEN)
    base = {EMBEDDING: ones(8, HIDDEN), HEAD: ones(8, HIDDEN), f"{MLP}.gate_up_proj": stack}
    factors = {f"{MLP}.lora_A.weight": (count, HIDDEN), f"{MLP}.lora_B.weight": (2 * WIDTH, count)}
    merge(root, f"{MLP}.gate_up_proj", base, factors, {"target_parameters": ["experts.gate_up_proj"]})

def turned(root, count):
    experts(root, count, transposed=True)

root, kind, small = Path(sys.argv[1]), globals()[sys.argv[2]], int(sys.argv[3])
kind(root / "small", small)
before = resident_peak()
kind(root / "large", 3 * small)
print(resident_peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), [("dora", 2**15), ("experts", 64), ("turned", 64)])
def test_a_tensor_of_three_times_the_size_takes_no_more(tmp_path: Path, kind: str, size: int) -> None:
    """From 64 MiB to 192 MiB the high-water mark rises by less than six blocks of 8 MiB: so many may be under way."""
    command = [sys.executable, "-c", RISE, str(tmp_path), kind, str(size)]
    assert int(subprocess.check_output(command, cwd=REPOSITORY, text=True)) < 48 * 2**20
