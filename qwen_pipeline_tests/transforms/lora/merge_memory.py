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
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen2Config, Qwen3MoeConfig

from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.checkpoint.measure import resident_peak
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.checkpoint.writer import write_checkpoint
from qwen_pipeline.transforms.lora.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, open_adapter
from qwen_pipeline.transforms.lora.adapter_set import single
from qwen_pipeline.transforms.lora.merge import merge_lora

HIDDEN, WIDTH = 1024, 256
SIZES: Mapping[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
EMBEDDING, MLP = "model.embed_tokens.weight", "model.layers.0.mlp.experts"


def ones(*shape: int) -> LazyTensor:
    spec = TensorSpec(dtype="BF16", shape=shape)
    return LazyTensor(spec=spec, read=lambda start, stop: torch.ones(stop - start, *shape[1:], dtype=torch.bfloat16))


def model(config: PreTrainedConfig) -> dict[str, LazyTensor]:
    """Return the tensors of a model that Transformers builds, all ones."""
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    return {name: ones(*tensor.shape) for name, tensor in state.items()}


def write_merged(
    root: Path,
    name: str,
    config: PreTrainedConfig,
    base: Mapping[str, LazyTensor],
    factors: Mapping[str, tuple[int, ...]],
    settings: Mapping[str, Any],
) -> None:
    """Merge an adapter of ones and write one tensor of the result."""
    root.mkdir(parents=True)
    save_file({f"base_model.model.{key}": torch.ones(shape) for key, shape in factors.items()}, root / ADAPTER_WEIGHTS)
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, **settings}
    (root / ADAPTER_CONFIG).write_text(json.dumps(settings))
    shards = dict.fromkeys(base, "model.safetensors")
    whole = Checkpoint(config=config.to_dict(), tensors=base, shards=shards)
    merged = merge_lora(whole, single(open_adapter(root))).checkpoint
    only = Checkpoint(config=whole.config, tensors={name: merged.tensors[name]}, shards={name: shards[name]})
    write_checkpoint(only, root, task="")
    (root / "model.safetensors").unlink()


def dora(root: Path, rows: int) -> None:
    config = Qwen2Config(**SIZES, intermediate_size=WIDTH, vocab_size=rows, tie_word_embeddings=False)
    factors = {"lora_embedding_A": (1, rows), "lora_embedding_B": (HIDDEN, 1), "lora_magnitude_vector": (HIDDEN,)}
    factors = {f"model.embed_tokens.{part}": shape for part, shape in factors.items()}
    write_merged(root, EMBEDDING, config, model(config), factors, {"use_dora": True})


def experts(root: Path, count: int, *, transposed: bool = False) -> None:
    config = Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=WIDTH, num_experts=count, vocab_size=8, tie_word_embeddings=False
    )
    base = model(config)
    if transposed:
        base[f"{MLP}.gate_up_proj"] = ones(count, HIDDEN, 2 * WIDTH)
        base[f"{MLP}.down_proj"] = ones(count, WIDTH, HIDDEN)
    factors = {f"{MLP}.lora_A.weight": (count, HIDDEN), f"{MLP}.lora_B.weight": (2 * WIDTH, count)}
    settings = {"target_parameters": ["experts.gate_up_proj"]}
    write_merged(root, f"{MLP}.gate_up_proj", config, base, factors, settings)


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
