"""Factors of stacked experts are read in the layout in which PEFT, by its version, or Unsloth saved them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from qwen_pipeline.errors import AdapterRefused
from qwen_pipeline.transforms.lora.adapter import ADAPTER_CONFIG
from qwen_pipeline.transforms.lora.saved.weights import ADAPTER_WEIGHTS
from qwen_pipeline_tests.layouts import fused
from qwen_pipeline_tests.oracles import merged_with
from qwen_pipeline_tests.tiny import HIDDEN, load_tiny, tiny_model

pytestmark = pytest.mark.lengthy

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
EXPERTS, RANK = 4, 3
SQUARE = {GATE_UP: HIDDEN // 2, DOWN: HIDDEN}
"""Stack -> the width at which its matrices are square."""

Tensors = dict[str, torch.Tensor]


def base_of(root: Path, width: int, family: str = "qwen3_moe") -> Path:
    return tiny_model(family, root, dtype=torch.float32, moe_intermediate_size=width, num_experts=EXPERTS)


def trained(base: Path, root: Path, version: str | None, targets: tuple[str, ...] = (GATE_UP, DOWN)) -> Tensors:
    """Have PEFT train stacks as this version of it does, and save the adapter; return PEFT's own merge in float64.

    Up to 0.19.0, PEFT treats every stack as today's treats one that says ``is_transposed``.
    """
    torch.manual_seed(1)
    model: Any = load_tiny(base)
    for module in model.modules():
        if hasattr(module, "is_transposed"):
            module.is_transposed = version in (None, "0.17.1", "0.18.0", "0.19.0")
    lora = LoraConfig(r=RANK, lora_alpha=6, target_modules=["q_proj"], target_parameters=list(targets))
    peft: Any = get_peft_model(model, lora)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    peft.save_pretrained(str(root))
    edit(root, peft_version=version)
    return peft.double().merge_and_unload().state_dict()


def edit(root: Path, **fields: Any) -> None:
    settings = json.loads((root / ADAPTER_CONFIG).read_text()) | fields
    (root / ADAPTER_CONFIG).write_text(
        json.dumps({name: value for name, value in settings.items() if value is not None})
    )


def assert_merged(base: Path, adapter: Path, expected: Tensors) -> None:
    merged = merged_with(base, adapter)
    found = fused({name: merged.load(name) for name in merged})
    for name in (name for name in expected if ".experts." in name or ".q_proj." in name):
        torch.testing.assert_close(found[name].double(), expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [96, *SQUARE.values()])
@pytest.mark.parametrize("version", ["0.17.1", "0.18.0", "0.19.0", "0.19.1", "0.21.2"])
def test_the_layout_of_any_version_is_read_as_by_that_peft(tmp_path: Path, version: str, width: int) -> None:
    base = base_of(tmp_path / "base", width)
    expected = trained(base, tmp_path / "adapter", version)
    assert_merged(base, tmp_path / "adapter", expected)


@pytest.mark.parametrize("target", SQUARE)
def test_the_version_decides_on_square_matrices_alone(tmp_path: Path, target: str) -> None:
    base, adapter = base_of(tmp_path / "base", SQUARE[target]), tmp_path / "adapter"
    for version in ("0.18.0", "0.19.1"):
        assert_merged(base, adapter, trained(base, adapter, version, (target,)))
    expected = trained(base, adapter, None, (target,))
    with pytest.raises(AdapterRefused, match=r"square matrices of experts.*peft_version None") as refusal:
        merged_with(base, adapter)
    assert '"peft_version": "0.18.0"' in refusal.value.remedy
    edit(adapter, peft_version="0.18.0")
    assert_merged(base, adapter, expected)


def test_square_stacks_that_transformers_4_held_transposed_are_refused(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", SQUARE[DOWN], "qwen3_vl_moe")
    trained(base, tmp_path / "adapter", "0.19.1", (DOWN,))
    with pytest.raises(AdapterRefused, match="Transformers 4 and 5"):
        merged_with(base, tmp_path / "adapter")


def test_a_version_is_not_needed_where_shapes_decide(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", 96)
    expected = trained(base, tmp_path / "adapter", None)
    assert_merged(base, tmp_path / "adapter", expected)


@pytest.mark.parametrize("version", ["0.18.0", "0.21.2"])
@pytest.mark.parametrize("nested", [False, True])
def test_unsloths_columns_are_read_in_the_order_that_it_states(tmp_path: Path, version: str, nested: bool) -> None:
    base, adapter = base_of(tmp_path / "base", 96), tmp_path / "adapter"
    expected = trained(base, adapter, version)
    edit(adapter, auto_mapping={"parent_library": "transformers", "unsloth_fixed": True})
    with pytest.raises(AdapterRefused, match="lora_B_layout=None") as refusal:
        merged_with(base, adapter)
    assert '"grouped_by_expert"' in refusal.value.remedy
    edit(adapter, lora_B_layout="rank_major")
    assert_merged(base, adapter, expected)

    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    for name in (name for name in tensors if ".experts." in name and "lora_B" in name):
        by_rank = tensors[name].reshape(-1, RANK, EXPERTS)
        tensors[name] = by_rank.transpose(1, 2).reshape(tensors[name].shape).contiguous()
    save_file(tensors, adapter / ADAPTER_WEIGHTS)
    order = {"lora_B_layout": "grouped_by_expert"}
    stated = {"unsloth_fused_expert_lora": {"parameters": {"gate_up_proj": order, "down_proj": order}}}
    edit(adapter, **(stated if nested else order))
    assert_merged(base, adapter, expected)
    edit(adapter, lora_B_layout="by_moonlight", unsloth_fused_expert_lora=None)
    with pytest.raises(AdapterRefused, match="by_moonlight"):
        merged_with(base, adapter)
