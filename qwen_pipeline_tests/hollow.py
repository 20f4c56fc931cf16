"""Models of any size that hold no weights: files with true headers, whose data are holes."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from qwen_pipeline.checkpoint.lazy import CONFIG, INDEX
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec, header_bytes

QWEN_72B = Qwen2Config(
    architectures=["Qwen2ForCausalLM"], hidden_size=8192, intermediate_size=29568, num_hidden_layers=80,
    num_attention_heads=64, num_key_value_heads=8, vocab_size=152064, tie_word_embeddings=False,
)  # fmt: skip


def hollow_model(root: Path, config: Qwen2Config = QWEN_72B, *, shards: int = 37) -> Path:
    """Write a model in BF16 that takes no space, with the tensors that Transformers builds; return ``root``."""
    root.mkdir(parents=True)
    fields: dict[str, Any] = {**config.to_dict(), "num_hidden_layers": 1, "layer_types": None}
    first = type(config)(**fields)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in AutoModelForCausalLM.from_config(first).state_dict().items()}
    specs = {
        name.replace(".layers.0.", f".layers.{layer}."): TensorSpec(dtype="BF16", shape=shape)
        for layer in range(config.num_hidden_layers)
        for name, shape in shapes.items()
    }
    owners = {name: f"model-{n % shards + 1:05}-of-{shards:05}.safetensors" for n, name in enumerate(specs)}
    for file in set(owners.values()):
        held = {name: spec for name, spec in specs.items() if owners[name] == file}
        header = header_bytes(held)
        (root / file).write_bytes(header)
        os.truncate(root / file, len(header) + sum(spec.nbytes for spec in held.values()))
    (root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": owners}))
    (root / CONFIG).write_text(json.dumps(config.to_dict()))
    return root
