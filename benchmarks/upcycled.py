"""A real mixture of experts without a hub: the demo's dense base, upcycled into a Qwen2-MoE of the same function.

Every third layer, or each, becomes a mixture. Some of its MLP's channels become the shared expert, the others each
routed expert: experts are copies, so for any routing the sum is the dense MLP's output
(https://arxiv.org/abs/2212.05055). Each expert is calibrated on the tokens that reach it, as in any mixture.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qwen_pipeline.checkpoint.lazy import SINGLE_SHARD, Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.writer import write_bytes

ROUTED = 768
"""Channels of a routed expert, as in Qwen3-30B-A3B; 8 ranks of whole groups of 128 need 1024."""
EXPERTS = 2
PER_TOKEN = 1
STEP = 3


def upcycle(base: Path, out: Path, *, step: int = STEP, quiet: int = 0) -> Path:
    """Write the mixture into ``out``, which must not exist; return it.

    Args:
        base: A dense Qwen2 checkpoint.
        out: Directory of the mixture.
        step: One layer in this many becomes a mixture.
        quiet: Power of two by which up rows are divided and down columns multiplied, so that the activations between
            them are smaller; the function is exactly the same.
    """
    from transformers import Qwen2MoeConfig

    dense = open_checkpoint(base)
    source = dense.config
    shared = int(source["intermediate_size"]) - ROUTED
    config = Qwen2MoeConfig(
        **{name: value for name, value in source.items() if name not in ("model_type", "architectures", "layer_types")},
        moe_intermediate_size=ROUTED,
        shared_expert_intermediate_size=shared,
        num_experts=EXPERTS,
        num_experts_per_tok=PER_TOKEN,
        decoder_sparse_step=step,
        norm_topk_prob=True,
        architectures=["Qwen2MoeForCausalLM"],
    )
    out.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    mixtures = [f"model.layers.{layer}.mlp" for layer in range(step - 1, config.num_hidden_layers, step)]
    for name in dense:
        if not name.startswith(tuple(f"{mlp}." for mlp in mixtures)):
            tensors[name] = dense.load(name)
    for seed, mlp in enumerate(mixtures):
        tensors |= _mixture(dense, mlp, shared, scale=2.0**quiet, seed=seed)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / SINGLE_SHARD, {"format": "pt"})
    config.save_pretrained(out)
    for relative, file in dense.sidecars.items():
        write_bytes(out / relative, file.read_bytes())
    return out


def _mixture(dense: Checkpoint, mlp: str, shared: int, *, scale: float, seed: int) -> Mapping[str, Any]:
    gate_IH, up_IH, down_HI = (dense.load(f"{mlp}.{name}_proj.weight") for name in ("gate", "up", "down"))
    up_IH, down_HI = up_IH / scale, down_HI * scale
    hidden = gate_IH.shape[1]
    tensors = {
        f"{mlp}.gate.weight": torch.randn(EXPERTS, hidden, generator=torch.Generator().manual_seed(seed)).to(gate_IH),
        f"{mlp}.shared_expert_gate.weight": gate_IH.new_zeros(1, hidden),  # its sigmoid is a half
        f"{mlp}.shared_expert.gate_proj.weight": gate_IH[:shared],
        f"{mlp}.shared_expert.up_proj.weight": up_IH[:shared],
        f"{mlp}.shared_expert.down_proj.weight": down_HI[:, :shared] * 2,
    }
    for expert in range(EXPERTS):
        owner = f"{mlp}.experts.{expert}"
        tensors |= {
            f"{owner}.gate_proj.weight": gate_IH[shared:].clone(),
            f"{owner}.up_proj.weight": up_IH[shared:].clone(),
            f"{owner}.down_proj.weight": down_HI[:, shared:].clone(),
        }
    return tensors
