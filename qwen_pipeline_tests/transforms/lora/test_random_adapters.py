"""Adapters of random settings, saved by PEFT, merged by PEFT and by this package."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_pipeline_tests.adapter_kinds import Kind, merged_by_peft, train
from qwen_pipeline_tests.oracles import assert_no_further, merged_with
from qwen_pipeline_tests.tiny import LINEARS, tiny_qwen2

pytestmark = pytest.mark.lengthy

PATTERNS = st.sampled_from(
    ["q_proj", ".*_proj", r"layers\.1\..*", "^model.layers.0.mlp.up_proj", "self_attn.[qk]_proj"]
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("base"))


@st.composite
def loras(draw: st.DrawFn) -> dict[str, Any]:
    """Draw fields of ``LoraConfig`` that PEFT accepts together.

    Patterns are sorted, as PEFT saves them: if two overlap, an adapter trained with another order cannot be loaded.
    """
    use_dora = draw(st.booleans())
    return {
        "r": draw(st.integers(1, 8)),
        "lora_alpha": draw(st.integers(1, 32)),
        "use_rslora": draw(st.booleans()),
        "use_dora": use_dora,
        "target_modules": draw(
            st.lists(st.sampled_from([*LINEARS, "embed_tokens", "lm_head"]), min_size=1, unique=True)
        ),
        "rank_pattern": dict(sorted(draw(st.dictionaries(PATTERNS, st.integers(1, 6), max_size=2)).items())),
        "alpha_pattern": dict(sorted(draw(st.dictionaries(PATTERNS, st.integers(1, 40), max_size=2)).items())),
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
        "modules_to_save": draw(st.none() | st.just(["input_layernorm", "norm"])),
        "layers_to_transform": draw(st.none() | st.just([1])),
    }


@settings(max_examples=12)
@given(lora=loras())
def test_adapters_of_any_settings_are_merged_as_by_peft(base: Path, lora: dict[str, Any]) -> None:
    if lora["layers_to_transform"] and not set(lora["target_modules"]) & set(LINEARS):
        lora["layers_to_transform"] = None
    if lora["layers_to_transform"]:
        lora["target_modules"] = sorted(set(lora["target_modules"]) & set(LINEARS))
    kind = Kind(lora=lora)
    with tempfile.TemporaryDirectory() as scratch:
        train(kind, base, Path(scratch))
        ours = merged_with(base, Path(scratch))
        exact, theirs = (merged_by_peft(kind, base, Path(scratch), dtype) for dtype in (torch.float64, torch.bfloat16))
        for name in ours:
            assert_no_further(name, ours.load(name), theirs[name], exact[name])
