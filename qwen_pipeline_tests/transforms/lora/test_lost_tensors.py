"""A tensor of any kind of adapter that was lost, renamed, duplicated or reshaped is reported by name."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_pipeline.errors import PipelineError
from qwen_pipeline.transforms.lora.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qwen_pipeline_tests.adapter_kinds import KINDS, convolutions, train
from qwen_pipeline_tests.oracles import merged_with
from qwen_pipeline_tests.tiny import VOCABULARY, tiny_model

pytestmark = pytest.mark.lengthy

Tensors = dict[str, torch.Tensor]
REPEATED = ("original_module.", "modules_to_save.")
"""Duplicates and originals of a saved tensor, which PEFT saves as well: without them the merge is the same."""
COPY = "base_layer.weight"
"""A copy of the frozen weight that PEFT saves with the factors: the base has it too, unless the vocabulary changed."""


@pytest.fixture(scope="module", params=["two tensors", "tied", "convolutions"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """Return a base, and an adapter of each kind that applies to it; convolutions have a base of their own."""
    root, of_convolutions, is_tied = (
        tmp_path_factory.mktemp("trained"),
        request.param == "convolutions",
        request.param == "tied",
    )
    base = tiny_model("qwen2_audio" if of_convolutions else "qwen2_moe", root / "base", tie=is_tied)
    kinds = {
        name: kind
        for name, kind in KINDS.items()
        if kind.tied == is_tied and (kind.targets is convolutions) == of_convolutions
    }
    for name, kind in kinds.items():
        train(kind, base, root / name)
    return base, {name: root / name for name in kinds}


def _removed(tensors: Tensors, name: str) -> None:
    del tensors[name]


def _renamed(tensors: Tensors, name: str) -> None:
    tensors[f"{name}_typo"] = tensors.pop(name)


def _duplicated(tensors: Tensors, name: str) -> None:
    tensors[name.replace("base_model.model.", "base_model.model.copy.")] = tensors[name].clone()


def _reshaped(tensors: Tensors, name: str) -> None:
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])


@pytest.mark.parametrize("change", [_removed, _renamed, _duplicated, _reshaped])
def test_every_change_to_a_tensor_is_reported_by_name(
    trained: tuple[Path, dict[str, Path]], tmp_path: Path, change: Callable[[Tensors, str], None]
) -> None:
    base, adapters = trained
    for kind, adapter in adapters.items():
        intact = load_file(adapter / ADAPTER_WEIGHTS)
        shutil.copyfile(adapter / ADAPTER_CONFIG, tmp_path / ADAPTER_CONFIG)
        for name in {re.sub(r"layers\.\d+", "layers.0", name): name for name in intact}.values():
            repeated = REPEATED if KINDS[kind].vocabulary != VOCABULARY else (*REPEATED, COPY)
            if change is _removed and any(part in name for part in repeated):
                continue
            tensors = dict(intact)
            change(tensors, name)
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / ADAPTER_WEIGHTS)
            module = name.removeprefix("base_model.model.").split(".lora_")[0].removesuffix(".weight")
            last = module.removesuffix(".base_layer").split(".token_adapter")[0].split(".modules_to_save")[0]
            with pytest.raises(PipelineError) as refusal:
                merged_with(base, tmp_path)
            expected = "experts" if ".experts" in last else last.rpartition(".")[2]
            assert expected in str(refusal.value), (kind, name)
