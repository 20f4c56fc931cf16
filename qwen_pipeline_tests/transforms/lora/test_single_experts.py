"""LoRA of single experts, as models of Transformers 4 have them, merged into either layout of the base."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from qwen_pipeline_tests.layouts import fused
from qwen_pipeline_tests.oracles import assert_no_further, merged_with
from qwen_pipeline_tests.tiny import tiny_model


def module_tree(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> nn.Module:
    """Return a module tree with the tensors' names and an ``nn.Linear`` for each matrix."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        module = root
        for depth, part in enumerate(path, 1):
            if part not in dict(module.named_children()):
                is_matrix = depth == len(path) and leaf == "weight" and tensor.dim() == 2
                outputs, inputs = tensor.shape if is_matrix else (1, 1)
                module.add_module(part, nn.Linear(inputs, outputs, bias=False) if is_matrix else nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, nn.Parameter(tensor.to(dtype), requires_grad=False))
    return root


def test_an_adapter_of_single_experts_merges_into_separate_and_stacked_ones(tmp_path: Path) -> None:
    separate = tiny_model("qwen3_moe", tmp_path / "separate")
    stacked = tiny_model("qwen3_moe", tmp_path / "stacked", layout="fused")
    tensors = load_file(separate / "model.safetensors")
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(module_tree(tensors, torch.float32), lora).save_pretrained(str(tmp_path / "adapter"))
    exact, theirs = (
        PeftModel.from_pretrained(module_tree(tensors, dtype), str(tmp_path / "adapter"))
        .merge_and_unload()
        .state_dict()
        for dtype in (torch.float64, torch.bfloat16)
    )
    ours = merged_with(separate, tmp_path / "adapter")
    for name in ours:
        assert_no_further(name, ours.load(name), theirs[name], exact[name])
    expected, found = fused({name: ours.load(name) for name in ours}), merged_with(stacked, tmp_path / "adapter")
    assert expected.keys() == set(found)
    assert all(torch.equal(found.load(name), expected[name]) for name in found)
