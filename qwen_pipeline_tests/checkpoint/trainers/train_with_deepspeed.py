"""Trains two steps with DeepSpeed on CPUs and saves a checkpoint: the files in ``zero/`` are of version 0.19.8.

To make one again, in an environment with deepspeed, transformers and peft, start three processes with ``RANK``,
``LOCAL_RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT`` and ``DS_ACCELERATOR=cpu``::

    python -m qwen_pipeline_tests.checkpoint.trainers.train_with_deepspeed OUT zero2

Rank 0 also writes ``expected.safetensors``, the answer of DeepSpeed's own ``zero_to_fp32``.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 37, "hidden_size": 6, "intermediate_size": 7, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "tie_word_embeddings": True,
}  # fmt: skip


def main(out: str, kind: str) -> None:
    deepspeed = import_module("deepspeed")
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
    deepspeed.init_distributed(dist_backend="gloo")
    model = _model(kind)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    groups = [
        {"params": [each for each in trained.values() if each.dim() > 1], "weight_decay": 0.1},
        {"params": [each for each in trained.values() if each.dim() <= 1], "weight_decay": 0.0},
    ]
    zero = {"stage": int(kind[4]), "sub_group_size": 100, "stage3_param_persistence_threshold": 0}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[group for group in groups if group["params"]],
        config={
            "train_batch_size": 3,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "zero_optimization": zero,
        },
    )
    for step in range(2):
        torch.manual_seed(step)
        tokens = torch.randint(0, SIZES["vocab_size"], (1, 5))
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(out, exclude_frozen_parameters=kind.endswith("lora"))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        reference = import_module("deepspeed.utils.zero_to_fp32").get_fp32_state_dict_from_zero_checkpoint(out)
        tensors = {name: tensor.clone().contiguous() for name, tensor in reference.items()}
        save_file(tensors, Path(out) / "expected.safetensors")


def base_model() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **SIZES))


def _model(kind: str) -> Any:
    model = base_model()
    if kind.endswith("lora"):
        peft = import_module("peft")
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model.model.norm.weight.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    return model


if __name__ == "__main__":
    main(*sys.argv[1:])
