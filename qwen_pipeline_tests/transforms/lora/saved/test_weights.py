"""An adapter in shards is the adapter in one file; parts of a sharded training and mixed saves are refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_pipeline.errors import AdapterRefused
from qwen_pipeline.models.inbox import Arrival
from qwen_pipeline.stages.merge import merge
from qwen_pipeline.transforms.lora.adapter import open_adapter
from qwen_pipeline.transforms.lora.saved.weights import ADAPTER_INDEX, ADAPTER_WEIGHTS
from qwen_pipeline_tests.tiny import tiny_adapter, tiny_qwen3

SHARDS = tuple(ADAPTER_WEIGHTS.replace(".", f"-0000{n}-of-00003.") for n in (1, 2, 3))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_qwen3(tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return tiny_adapter(base, tmp_path / "adapter")


def shard(adapter: Path) -> Path:
    """Divide an adapter's file as Transformers divides large ones; factors of a pair are in different shards."""
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    owners = {name: SHARDS[number % 3] for number, name in enumerate(sorted(tensors))}
    for file in SHARDS:
        save_file({name: tensors[name] for name in tensors if owners[name] == file}, adapter / file)
    (adapter / ADAPTER_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": owners}))
    (adapter / ADAPTER_WEIGHTS).unlink()
    return adapter


def test_shards_merge_like_one_file(base: Path, adapter: Path, tmp_path: Path) -> None:
    whole = merge(base=base, fine_tune=adapter, destination=tmp_path / "whole")
    before = open_adapter(adapter).digest()
    sharded = open_adapter(shard(adapter)).digest()
    assert sharded != before
    merged = merge(base=base, fine_tune=adapter, destination=tmp_path / "merged")
    assert merged.manifest.contents.tensors == whole.manifest.contents.tensors
    tensors = load_file(adapter / SHARDS[1])
    save_file({name: t + 1 for name, t in tensors.items()}, adapter / SHARDS[1])
    assert open_adapter(adapter).digest() != sharded


def test_a_missing_shard_is_named_and_not_complete(adapter: Path) -> None:
    (shard(adapter) / SHARDS[2]).unlink()
    with pytest.raises(AdapterRefused, match=SHARDS[2]):
        open_adapter(adapter)
    assert SHARDS[2] in str(Arrival("adapter", adapter).obstacle())


def test_files_of_two_saves_are_refused(adapter: Path) -> None:
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    save_file(tensors, shard(adapter) / ADAPTER_WEIGHTS)
    with pytest.raises(AdapterRefused, match="both"):
        open_adapter(adapter)
    (adapter / ADAPTER_WEIGHTS).unlink()
    name, tensor = tensors.popitem()
    owner = json.loads((adapter / ADAPTER_INDEX).read_text())["weight_map"][name]
    other = next(file for file in SHARDS if file != owner)
    save_file(load_file(adapter / other) | {name: tensor}, adapter / other)
    with pytest.raises(AdapterRefused, match=f"does not agree with its shards: {name}"):
        open_adapter(adapter)


def test_an_index_that_leads_elsewhere_is_refused(adapter: Path) -> None:
    (adapter / ADAPTER_WEIGHTS).rename(adapter.parent / "elsewhere.safetensors")
    (adapter / ADAPTER_INDEX).write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(AdapterRefused, match=r"\.\./elsewhere"):
        open_adapter(adapter)


def test_empty_tensors_of_a_sharded_training_are_refused(adapter: Path) -> None:
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    name = next(iter(tensors))
    save_file(tensors | {name: torch.empty(0)}, adapter / ADAPTER_WEIGHTS)
    with pytest.raises(AdapterRefused, match=f"without values: {name}") as refusal:
        open_adapter(adapter)
    assert "qwen-pipeline convert" in refusal.value.remedy
