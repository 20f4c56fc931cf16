"""Several adapters are combined as PEFT combines them, or refused."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.errors import AdapterRefused, InputRefused
from qwen_pipeline.models.inbox import Inbox
from qwen_pipeline.models.open import fine_tune_digest, open_fine_tune
from qwen_pipeline.transforms.lora.adapter_set import ADAPTER_SET, AdapterSet, open_set, weighted
from qwen_pipeline.transforms.lora.merge import merge_lora
from qwen_pipeline_tests.tiny import tiny_adapter, tiny_qwen2

Combination = Literal["cat", "linear"]
WEIGHTS = [0.7, -0.4]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("base"), dtype=torch.float32)


@pytest.fixture(scope="module")
def pair(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("pair")
    style = tiny_adapter(base, root / "style", target_modules=["q_proj", "up_proj"], alpha_pattern={"up_proj": 3})
    return [style, tiny_adapter(base, root / "facts", seed=2, target_modules=["q_proj", "down_proj"], lora_alpha=5)]


@pytest.mark.parametrize("combination", ["cat", "linear"])
def test_weighted_merges_equal_those_of_peft(base: Path, pair: list[Path], combination: Combination) -> None:
    merged = merge_lora(open_checkpoint(base), weighted(pair, WEIGHTS, combination=combination)).checkpoint
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    peft = PeftModel.from_pretrained(model, str(pair[0]), adapter_name="style")
    peft.load_adapter(str(pair[1]), adapter_name="facts")
    peft.add_weighted_adapter(["style", "facts"], WEIGHTS, "both", combination_type=combination)
    exact = peft.merge_and_unload(adapter_names=["both"]).state_dict()
    for name in merged:
        assert torch.allclose(merged.load(name).double(), exact[name], rtol=0, atol=2e-7), name


def test_order_weights_and_combination_change_the_digest(pair: list[Path]) -> None:
    sets = [weighted(pair, WEIGHTS, combination="cat"), weighted(pair, [], combination="cat")]
    sets += [weighted(pair, WEIGHTS, combination="linear"), weighted(pair[::-1], WEIGHTS, combination="cat")]
    assert len({each.digest() for each in sets}) == len(sets)


def test_adapters_without_a_weighted_sum_are_refused_by_name(base: Path, pair: list[Path], tmp_path: Path) -> None:
    adapters: dict[str, dict[str, Any]] = {
        "use_dora": {"use_dora": True},
        "lm_head": {"modules_to_save": ["lm_head"]},
        "trainable_token_indices": {"trainable_token_indices": [1]},
    }
    for named, lora in adapters.items():
        adapter = tiny_adapter(base, tmp_path / named, target_modules=["q_proj"], **lora)
        with pytest.raises(AdapterRefused, match=named):
            weighted([pair[0], adapter], [], combination="cat")
    with pytest.raises(InputRefused, match="nan are not all finite"):
        weighted(pair, [1.0, float("nan")], combination="cat")
    with pytest.raises(InputRefused, match="one weight for each of 2 adapters, got 1"):
        weighted(pair, [1.0], combination="cat")


def test_ranks_that_differ_can_be_added_but_not_combined_linearly(base: Path, pair: list[Path], tmp_path: Path) -> None:
    other = tiny_adapter(base, tmp_path / "other", r=2, target_modules=["q_proj"])
    merge_lora(open_checkpoint(base), weighted([pair[0], other], [], combination="cat"))
    with pytest.raises(AdapterRefused, match="different shapes"):
        merge_lora(open_checkpoint(base), weighted([pair[0], other], [], combination="linear"))


def test_a_file_in_the_inbox_lists_adapters_and_weights(base: Path, tmp_path: Path) -> None:
    root = tmp_path / "inbox" / "both"
    for seed, name in enumerate(("style", "facts")):
        tiny_adapter(base, root / name, seed=seed, target_modules=["q_proj"])
    file = root / ADAPTER_SET
    file.write_text('[[adapters]]\npath = "style"\nweight = 0.5\n[[adapters]]\npath = "facts"\n')
    assert Inbox(root.parent).require("both").path == root
    found = open_fine_tune(root)
    assert isinstance(found, AdapterSet)
    assert [member.weight for member in found.members] == [0.5, 1.0]
    digest = fine_tune_digest(root)
    file.write_text(file.read_text().replace("0.5", "0.6"))
    assert fine_tune_digest(root) != digest
    for wrong in ('[[adapters]]\npath = "../both"\n', "adapters = []\n", "[[adapters]]\nname = 3\n"):
        file.write_text(wrong)
        with pytest.raises(AdapterRefused, match=ADAPTER_SET):
            open_set(root)
