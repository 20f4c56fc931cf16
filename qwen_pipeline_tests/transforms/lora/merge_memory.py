"""Peak memory of merges by tensor size; run with ``python -m``, since a process has one high-water mark.

Arguments: scratch directory, kind of merge, size. Prints by how many bytes the peak rises from a merge of this size to
one of three times the size.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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


def ones(*shape: int) -> LazyTensor:
    spec = TensorSpec(dtype="BF16", shape=shape)
    return LazyTensor(spec=spec, read=lambda start, stop: torch.ones(stop - start, *shape[1:], dtype=torch.bfloat16))


def write_merged(
    root: Path,
    name: str,
    base: Mapping[str, LazyTensor],
    factors: Mapping[str, tuple[int, ...]],
    settings: Mapping[str, Any],
) -> None:
    """Merge an adapter of ones and write one tensor of the result."""
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


def dora(root: Path, rows: int) -> None:
    base = {EMBEDDING: ones(rows, HIDDEN), HEAD: ones(rows, HIDDEN)}
    factors = {"lora_embedding_A": (1, rows), "lora_embedding_B": (HIDDEN, 1), "lora_magnitude_vector": (HIDDEN,)}
    factors = {f"model.embed_tokens.{part}": shape for part, shape in factors.items()}
    write_merged(root, EMBEDDING, base, factors, {"use_dora": True})


def experts(root: Path, count: int, *, transposed: bool = False) -> None:
    stack = ones(count, HIDDEN, 2 * WIDTH) if transposed else ones(count, 2 * WIDTH, HIDDEN)
    base = {EMBEDDING: ones(8, HIDDEN), HEAD: ones(8, HIDDEN), f"{MLP}.gate_up_proj": stack}
    factors = {f"{MLP}.lora_A.weight": (count, HIDDEN), f"{MLP}.lora_B.weight": (2 * WIDTH, count)}
    write_merged(root, f"{MLP}.gate_up_proj", base, factors, {"target_parameters": ["experts.gate_up_proj"]})


def transposed_experts(root: Path, count: int) -> None:
    experts(root, count, transposed=True)


KINDS: Mapping[str, Callable[[Path, int], None]] = {
    "dora": dora,
    "experts": experts,
    "transposed experts": transposed_experts,
}

if __name__ == "__main__":
    scratch, kind, size = Path(sys.argv[1]), KINDS[sys.argv[2]], int(sys.argv[3])
    kind(scratch / "small", size)
    before = resident_peak()
    kind(scratch / "large", 3 * size)
    print(resident_peak() - before)
