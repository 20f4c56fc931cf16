"""Adapters under any trainer's spelling of PEFT's names merge like the adapter that PEFT saved itself."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qwen_pipeline.errors import AdapterRefused
from qwen_pipeline.transforms.lora.saved.names import PREFIX, spelling_of
from qwen_pipeline.transforms.lora.saved.weights import ADAPTER_WEIGHTS
from qwen_pipeline_tests.adapter_kinds import KINDS, merged_by_peft, train
from qwen_pipeline_tests.oracles import merged_with
from qwen_pipeline_tests.tiny import tiny_adapter, tiny_model, tiny_qwen3

pytestmark = pytest.mark.lengthy

Tensors = dict[str, torch.Tensor]
Rename = Callable[[str], str]
NAMED = re.compile(r"(lora_[AB])\.")

SPELLINGS: dict[str, Rename] = {
    "named": lambda name: NAMED.sub(r"\1.default.", name),
    "named by a trainer": lambda name: NAMED.sub(r"\1.actor.", name),
    "compiled": lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "compiled outside": lambda name: f"_orig_mod.{name}",
    "fsdp": lambda name: f"_fsdp_wrapped_module.{name}",
    "fsdp of layers": lambda name: re.sub(r"(layers\.\d+)", r"\1._fsdp_wrapped_module", name),
    "data parallel": lambda name: f"module.{name}",
    "bare": lambda name: name.removeprefix(PREFIX),
    "double": lambda name: PREFIX + name,
    "all of them": lambda name: "module._orig_mod." + PREFIX + NAMED.sub(r"\1.default.", name),
}


def renamed(adapter: Path, rename: Rename) -> Path:
    save_file({rename(name): t for name, t in load_file(adapter / ADAPTER_WEIGHTS).items()}, adapter / ADAPTER_WEIGHTS)
    return adapter


def tensors_of(base: Path, adapter: Path) -> Tensors:
    merged = merged_with(base, adapter)
    return {name: merged.load(name) for name in merged}


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3(tmp_path_factory.mktemp("base"), dtype=torch.float32)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_merges_like_pefts_own(base: Path, tmp_path: Path, spelling: str) -> None:
    adapter = tiny_adapter(base, tmp_path / "adapter", rank_pattern={"q_proj": 2})
    expected = tensors_of(base, adapter)
    exact = merged_by_peft(KINDS["linear"], base, adapter, torch.float64)
    assert_same(tensors_of(base, renamed(adapter, SPELLINGS[spelling])), expected)
    assert all(torch.allclose(expected[name].double(), exact[name], rtol=0, atol=1e-6) for name in expected)


@pytest.mark.parametrize(
    "kind",
    ["dora", "dora embedding", "bias all", "lora_bias", "modules_to_save", "tokens", "experts", "router, down"],
)
def test_the_state_dict_of_a_trained_model_merges_like_what_peft_saves(tmp_path: Path, kind: str) -> None:
    base, adapter = tiny_model("qwen2_moe", tmp_path / "base"), tmp_path / "adapter"
    peft = train(KINDS[kind], base, adapter)
    expected = tensors_of(base, adapter)
    names = {name for name, parameter in peft.named_parameters() if parameter.requires_grad}
    raw = {f"_fsdp_wrapped_module.{name}": t.contiguous() for name, t in peft.state_dict().items() if name in names}
    assert any(".default" in name for name in raw)
    save_file(raw, adapter / ADAPTER_WEIGHTS)
    assert_same(tensors_of(base, adapter), expected)


def test_several_adapters_in_one_file_are_refused_by_name(base: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    both = {
        NAMED.sub(rf"\1.{who}.", name): t.clone() for who in ("default", "reference") for name, t in tensors.items()
    }
    save_file(both, adapter / ADAPTER_WEIGHTS)
    with pytest.raises(AdapterRefused, match="several adapters: default, reference"):
        merged_with(base, adapter)


@pytest.mark.parametrize("rename", [SPELLINGS["named"], SPELLINGS["bare"], SPELLINGS["double"]])
def test_two_spellings_in_one_file_are_refused(base: Path, tmp_path: Path, rename: Rename) -> None:
    adapter = tiny_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    renamed(adapter, lambda name: rename(name) if "layers.0" in name else name)
    with pytest.raises(AdapterRefused, match=r"layers\.0\.self_attn\.q_proj"):
        merged_with(base, adapter)


PATHS = st.sampled_from(
    [f"model.layers.{layer}.{module}.lora_{part}.weight" for layer in (0, 11) for module in ("q_proj", "mlp.module_x")
     for part in "AB"]
)  # fmt: skip


@given(paths=st.sets(PATHS, min_size=1), spelling=st.sampled_from(sorted(SPELLINGS)))
def test_names_are_pefts_and_each_keeps_its_own_tensor(paths: set[str], spelling: str) -> None:
    names = {PREFIX + path for path in paths}
    kept = spelling_of(names, source="adapter")
    assert (kept.names, kept.differences) == ({name: name for name in names}, ())
    found = spelling_of({SPELLINGS[spelling](name) for name in names}, source="adapter")
    assert found.names == {name: SPELLINGS[spelling](name) for name in names}
    assert found.differences
