"""An adapter is opened completely, or refused with the name of the setting or tensor that is wrong."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from qwen_pipeline.errors import AdapterRefused
from qwen_pipeline.stages.convert import convert
from qwen_pipeline.stages.merge import merge
from qwen_pipeline.transforms.lora.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, open_adapter
from qwen_pipeline.transforms.lora.settings import (
    _OTHER_METHODS,  # pyright: ignore[reportPrivateUsage]
    _UNMERGEABLE,  # pyright: ignore[reportPrivateUsage]
    _UNSUPPORTED,  # pyright: ignore[reportPrivateUsage]
    LoraSettings,
    lora_settings,
)
from qwen_pipeline_tests.oracles import merged_with, peft_merge
from qwen_pipeline_tests.tiny import load_tiny, tiny_adapter, tiny_model, tiny_qwen2, tiny_qwen3

Tensors = dict[str, torch.Tensor]
UP_A = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
UP_B = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return tiny_adapter(base, tmp_path / "adapter")


def _removed(tensors: Tensors, name: str) -> None:
    del tensors[name]


def _renamed(tensors: Tensors, name: str) -> None:
    tensors[name.replace("lora_", "lora_typo_")] = tensors.pop(name)


def _without_prefix(tensors: Tensors, name: str) -> None:
    tensors[name.removeprefix("base_model.model.")] = tensors.pop(name)


def _duplicated(tensors: Tensors, name: str) -> None:
    tensors[name.replace(".weight", ".default.weight")] = tensors[name].clone()


def _flattened(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].flatten()


def _cut(tensors: Tensors, name: str) -> None:
    axis = 0 if "lora_A" in name else 1
    tensors[name] = tensors[name].narrow(axis, 0, 3).contiguous()


@pytest.mark.parametrize("change", [_removed, _renamed, _without_prefix, _duplicated, _flattened, _cut])
def test_a_change_to_any_tensor_is_refused(base: Path, adapter: Path, change: Callable[[Tensors, str], None]) -> None:
    intact = load_file(adapter / ADAPTER_WEIGHTS)
    for name in intact:
        tensors = dict(intact)
        change(tensors, name)
        save_file(tensors, adapter / ADAPTER_WEIGHTS)
        module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        with pytest.raises(AdapterRefused, match=module):
            merged_with(base, adapter)


@pytest.mark.parametrize(
    "lora",
    [
        {"alora_invocation_tokens": [3]},
        {"layer_replication": [(0, 2), (1, 2)]},
        {"init_lora_weights": "pissa", "target_modules": ["q_proj"]},
        {"init_lora_weights": "pissa_niter_4", "target_modules": ["q_proj"]},
        {"init_lora_weights": "olora", "target_modules": ["q_proj"]},
    ],
    ids=lambda lora: next(iter(lora)),
)
def test_settings_that_peft_saves_but_cannot_be_merged_are_refused_by_name(
    base: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    root = tiny_adapter(base, tmp_path / "adapter", **lora)
    with pytest.raises(AdapterRefused, match=next(iter(lora))) as refusal:
        open_adapter(root)
    assert refusal.value.remedy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, {"a": 1}) for name in (*_UNSUPPORTED, *_UNMERGEABLE)),
        *(("init_lora_weights", name) for name in ("loftq", "corda", "lora_ga")),
        *(("peft_type", name) for name in (*_OTHER_METHODS, "LOHA", "VERA", "IA3")),
        ("peft_type", None),
        ("base_model_name_or_path", ["Qwen/Qwen3-8B"]),
        ("base_model_name_or_path", "Qwen\0"),
        ("base_model_name_or_path", "Qwen\x1b[31m"),
        ("base_model_name_or_path", "Q" * 5000),
        ("revision", 7),
        ("peft_version", 0.18),
        ("setting_of_tomorrow", "on"),
        ("setting_of_tomorrow", 16),
    ],
)
def test_an_unsupported_setting_in_the_file_is_refused_by_name(adapter: Path, name: str, value: object) -> None:
    _edit(adapter, {name: value})
    with pytest.raises(AdapterRefused, match=name.replace("peft_type", "PEFT type")):
        open_adapter(adapter)


@pytest.mark.parametrize(
    "edit",
    [
        {"r": 0},
        {"r": 3},
        {"r": None},
        {"lora_alpha": float("inf")},
        {"r": "4"},
        {"r": 4.0},
        {"r": True},
        {"r": 10**400},
        {"lora_alpha": 1e308},
        {"lora_alpha": -8},
        {"lora_alpha": 1e-320},
        {"lora_alpha": "8"},
        {"lora_alpha": True},
        {"alpha_pattern": {"up_proj": float("nan")}},
        {"rank_pattern": {"up_proj": "4"}},
        {"trainable_token_indices": {"embed_tokens": [-1]}},
        {"trainable_token_indices": {"embed_tokens": [2**40]}},
        {"rank_pattern": {"up_proj": 9}},
        {"rank_pattern": {"up_proj": -1}},
        {"alpha_pattern": {"(": 1}},
    ],
    ids=str,
)
def test_invalid_numbers_are_refused(adapter: Path, edit: dict[str, Any]) -> None:
    _edit(adapter, edit)
    with pytest.raises(AdapterRefused) as refusal:
        open_adapter(adapter)
    assert edit == {"r": 3} or next(iter(edit)) in refusal.value.what or "up_proj" in refusal.value.what


def test_every_setting_of_the_installed_peft_is_known() -> None:
    """Every default is accepted, so no adapter is refused for a field of a newer PEFT that was not set."""
    defaults = json.loads(json.dumps(LoraConfig(r=4).to_dict()))
    assert lora_settings(defaults, source=Path("adapter_config.json")).r == 4, peft.__version__


def test_pickled_weights_are_refused_with_a_conversion_that_works(adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    torch.save(tensors, adapter / "adapter_model.bin")
    (adapter / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(AdapterRefused, match=r"adapter_model\.bin") as refusal:
        open_adapter(adapter)
    _, _, line = refusal.value.remedy.partition(": qwen-pipeline ")
    assert shlex.split(line) == ["convert", "--from", str(adapter), "--out", "DIRECTORY"]
    converted = convert(source=adapter, destination=tmp_path / "converted").path
    assert len(open_adapter(converted).tensors.factors) * 2 == len(tensors)


def test_adapters_that_peft_cannot_merge_are_refused_by_name(tmp_path: Path) -> None:
    depthwise = tiny_model("qwen3_5_text", tmp_path / "depthwise")
    adapter = tiny_adapter(depthwise, tmp_path / "grouped", target_modules=["conv1d"], r=128, use_dora=True)
    with pytest.raises(AdapterRefused, match=r"grouped convolutions.*layers\.0\.linear_attn\.conv1d"):
        merged_with(depthwise, adapter)
    with pytest.raises(NotImplementedError, match="groups > 1"):
        peft_merge(depthwise, adapter, dtype=torch.float32)
    unbiased = tiny_qwen3(tmp_path / "unbiased")
    adapter = tiny_adapter(unbiased, tmp_path / "lora_bias", target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(AdapterRefused, match=r"q_proj\.lora_B\.bias \(the base has 0 tensors"):
        merged_with(unbiased, adapter)
    with pytest.raises(RuntimeError, match="no bias"):
        peft_merge(unbiased, adapter, dtype=torch.float32)


def test_other_methods_are_refused_with_a_merge_that_works(base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    torch.manual_seed(1)
    model = get_peft_model(load_tiny(base, torch.bfloat16), LoHaConfig(r=4, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "hada" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(adapter))
    with pytest.raises(AdapterRefused, match="LOHA") as refusal:
        open_adapter(adapter)
    assert "merge_and_unload().save_pretrained(...)" in refusal.value.remedy
    merged: Any = PeftModel.from_pretrained(load_tiny(base, torch.bfloat16), str(adapter)).merge_and_unload()
    merged.save_pretrained(str(tmp_path / "model"))
    ours = merge(base=base, fine_tune=tmp_path / "model", destination=tmp_path / "merged").path
    assert torch.equal(load_file(ours / "model.safetensors")[QUERY], merged.state_dict()[QUERY])


def test_missing_weights_are_refused(adapter: Path) -> None:
    (adapter / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(AdapterRefused, match=ADAPTER_WEIGHTS):
        open_adapter(adapter)


PATTERNS = st.sampled_from(
    ["q_proj", "proj", ".*proj", "self_attn.q_proj", r"layers\.1\..*", "^model.layers.0.mlp.up_proj", "[qk]_proj", "1"]
)
MODULES = st.sampled_from(
    [f"model.layers.{n}.{part}" for n in (0, 1, 11) for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")]
)


@given(patterns=st.dictionaries(PATTERNS, st.integers(1, 99), max_size=5), module=MODULES)
def test_patterns_are_resolved_as_by_peft(patterns: dict[str, int], module: str) -> None:
    settings = LoraSettings(r=100, lora_alpha=100, rank_pattern=patterns)
    key = get_pattern_key(list(patterns), module)
    assert settings.rank(module) == patterns.get(key, 100)


def _edit(adapter: Path, changes: dict[str, Any]) -> None:
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config | changes))


def test_a_pattern_cannot_match_for_ever() -> None:
    """Python's ``re`` needs time exponential in the length of the name."""
    settings = LoraSettings(r=4, lora_alpha=4, rank_pattern={"((a+)+)+b": 8})
    assert settings.rank("a" * 10_000) == 4
    assert settings.rank("a" * 10_000 + "b") == 8


@pytest.mark.parametrize("pattern", ["(?=q)q_proj", "(?<!k)_proj", r"(.)\1", "q{100000}", "q_proj("])
def test_a_pattern_that_re2_does_not_have_is_refused_by_name(pattern: str) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "alpha_pattern": {pattern: 8}}
    with pytest.raises(AdapterRefused) as refusal:
        lora_settings(config, source=Path("adapter_config.json"))
    assert f"{pattern!r} is not a regular expression of RE2" in refusal.value.what
