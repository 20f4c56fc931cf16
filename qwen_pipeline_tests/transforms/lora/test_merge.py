"""Our merges equal PEFT's, and are never further from the float64 result than PEFT's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.errors import AdapterRefused, QuantizedInputRefused
from qwen_pipeline.transforms.lora.adapter import ADAPTER_WEIGHTS, open_adapter
from qwen_pipeline.transforms.lora.adapter_set import single
from qwen_pipeline.transforms.lora.merge import merge_lora
from qwen_pipeline_tests.in_memory import blocks_of, read_in_blocks
from qwen_pipeline_tests.oracles import assert_no_further, merged_with, peft_merge
from qwen_pipeline_tests.tiny import LINEARS, tiny_adapter, tiny_qwen2, tiny_qwen3, tiny_vl, with_codes

pytestmark = pytest.mark.lengthy

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 8},
    "two linears": {"target_modules": ["q_proj", "down_proj"]},
    "one layer": {"layers_to_transform": [1]},
    "patterns": {
        "rank_pattern": {"down_proj": 2, r"layers\.1\.mlp\.up_proj": 6, "^model.layers.0.self_attn.q_proj": 3},
        "alpha_pattern": {"k_proj": 32, r".*\.0\.mlp\..*": 5},
        "use_rslora": True,
    },
    "patterns that overlap": {"alpha_pattern": {"self_attn.q_proj": 3, "q_proj": 5, ".*proj": 7}},
    "untied embeddings": {"target_modules": [*LINEARS, "lm_head", "embed_tokens"]},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {dtype: tiny_qwen2(root / str(dtype), dtype=dtype) for dtype in (torch.float16, torch.float32)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_variant_is_further_from_the_float64_result_than_peft(
    bases: dict[torch.dtype, Path], tmp_path: Path, variant: str
) -> None:
    """The dtypes are those that ``test_adapter_matrix`` does not cover."""
    adapter = tiny_adapter(bases[torch.float32], tmp_path / "adapter", **VARIANTS[variant])
    for dtype, base in bases.items():
        merged = merged_with(base, adapter)
        exact, theirs = (peft_merge(base, adapter, dtype=d) for d in (torch.float64, dtype))
        assert merged.keys() == exact.keys()
        for name in merged:
            assert_no_further(name, merged.load(name), theirs[name], exact[name])


def test_linear_layers_of_a_model_with_tied_embeddings_are_merged(tmp_path: Path) -> None:
    base = tiny_qwen3(tmp_path / "base", tie=True, shards=3, dtype=torch.float32)
    adapter = tiny_adapter(base, tmp_path / "adapter")
    merged = merged_with(base, adapter)
    theirs = peft_merge(base, adapter, dtype=torch.float32)
    assert all(torch.allclose(merged.load(name), theirs[name], rtol=0, atol=1e-6) for name in merged)


def test_blocks_of_rows_give_the_same_bytes_as_the_whole(tmp_path: Path) -> None:
    base = tiny_qwen2(tmp_path / "base")
    merged = merged_with(base, tiny_adapter(base, tmp_path / "adapter"))
    for name in merged:
        with blocks_of(8 * 64 * 2):
            blocks = read_in_blocks(merged, name)
        assert torch.equal(blocks, merged.load(name)), name


def test_the_sum_is_rounded_once(tmp_path: Path) -> None:
    base, root = tiny_qwen2(tmp_path / "base"), tmp_path / "adapter"
    tensors = load_file(tiny_adapter(base, root, target_modules=["q_proj"], r=1, lora_alpha=1) / ADAPTER_WEIGHTS)
    up, down = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "BA")
    tensors[up], tensors[down] = torch.ones(64, 1), torch.full((1, 64), 2**-8 + 2**-16)
    save_file(tensors, root / ADAPTER_WEIGHTS)
    name = "model.layers.0.self_attn.q_proj.weight"
    weights = load_file(base / "model.safetensors") | {name: torch.ones(64, 64).bfloat16()}
    save_file(weights, base / "model.safetensors")
    assert (merged_with(base, root).load(name) == 1 + 2**-7).all()
    assert (torch.ones(1).bfloat16() + (tensors[up] @ tensors[down]).bfloat16() == 1.0).all()


def test_a_quantized_base_is_refused_with_the_name_of_the_required_one(tmp_path: Path) -> None:
    base = tiny_qwen2(tmp_path / "base")
    adapter = open_adapter(tiny_adapter(base, tmp_path / "adapter"))
    with pytest.raises(QuantizedInputRefused, match=rf"qweight, I32.*{base}"):
        merge_lora(open_checkpoint(with_codes(base)), single(adapter))


def test_an_update_of_another_width_names_both_shapes(tmp_path: Path) -> None:
    wide = tiny_qwen2(tmp_path / "wide", intermediate_size=128)
    adapter = tiny_adapter(wide, tmp_path / "adapter")
    with pytest.raises(AdapterRefused, match=r"the update is \[64, 128\], but .*down_proj.weight is \[64, 96\]"):
        merged_with(tiny_qwen2(tmp_path / "base"), adapter)


def test_modules_that_the_base_does_not_have_are_named(tmp_path: Path) -> None:
    deep = tiny_qwen2(tmp_path / "deep", num_hidden_layers=3)
    adapter = tiny_adapter(deep, tmp_path / "adapter")
    with pytest.raises(
        AdapterRefused,
        match=r"7 tensors or modules of .* cannot be merged .*model\.layers\.2\.mlp\.down_proj \(the base has 0",
    ):
        merged_with(tiny_qwen2(tmp_path / "base"), adapter)


def test_two_updates_of_one_tensor_are_refused(tmp_path: Path) -> None:
    base = tiny_vl("qwen2_vl", tmp_path / "base")
    root = tiny_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    tensors = load_file(root / ADAPTER_WEIGHTS)
    tensors |= {name.replace("model.language_model.layers", "model.layers"): t.clone() for name, t in tensors.items()}
    save_file(tensors, root / ADAPTER_WEIGHTS)
    with pytest.raises(
        AdapterRefused, match=r"another update of this adapter already changes \S+layers\.0\.self_attn\.q_proj\.weight"
    ):
        merged_with(base, root)


def test_a_saved_copy_with_some_changed_rows_is_used_and_one_of_another_model_refused(tmp_path: Path) -> None:
    base = tiny_qwen2(tmp_path / "base")
    root = tiny_adapter(base, tmp_path / "adapter", target_modules=["lm_head"])
    copy = "base_model.model.lm_head.base_layer.weight"
    tensors = load_file(root / ADAPTER_WEIGHTS)
    tensors[copy][5, 5] += 1
    save_file(tensors, root / ADAPTER_WEIGHTS)
    exact = peft_merge(base, root, dtype=torch.float64)["lm_head.weight"]
    assert torch.allclose(merged_with(base, root).load("lm_head.weight").double(), exact, atol=2**-8)
    tensors[copy][: len(tensors[copy]) * 3 // 4] += 1
    save_file(tensors, root / ADAPTER_WEIGHTS)
    with pytest.raises(AdapterRefused, match=rf"{copy} \(most of its rows"):
        merged_with(base, root)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_by_tensor(tmp_path: Path, value: float) -> None:
    base = tiny_qwen2(tmp_path / "base")
    root = tiny_adapter(base, tmp_path / "adapter")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors = load_file(root / ADAPTER_WEIGHTS)
    tensors[name][3, 1] = value
    save_file(tensors, root / ADAPTER_WEIGHTS)
    with pytest.raises(AdapterRefused, match=name):
        merged_with(base, root)
