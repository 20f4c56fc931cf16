"""``inspect`` describes a fine-tune, the tensors that it changes, and why it would be refused."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from qwen_pipeline.cli.inspect import inspect
from qwen_pipeline.cli.results import CommandResult
from qwen_pipeline.errors import AdapterRefused
from qwen_pipeline_tests.cli.terminal import qwen_pipeline
from qwen_pipeline_tests.tiny import tiny_adapter, tiny_qwen2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("base"))


def printed(result: CommandResult) -> str:
    console = Console(record=True, file=StringIO(), width=120)
    for part in result.view:
        console.print(part)
    return console.export_text()


def test_every_changed_tensor_is_listed(base: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(base, tmp_path / "adapter", use_dora=True, target_modules=["q_proj"])
    ended = qwen_pipeline("inspect", adapter, "--base", base, "--json")
    assert (ended.code, ended.data["kind"]) == (0, "adapter")
    assert ended.data["adapters"][0]["base"] == str(base)
    merge = ended.data["lands"]["model.layers.1.self_attn.q_proj.weight"]
    assert merge["what"] == ["updated", "renormed"]
    assert merge["scalings"] == [2.0]
    assert len(merge["from"]) == 3
    assert "model.layers.*.self_attn.q_proj.weight" in printed(inspect(adapter, base=base))


def test_a_refusal_is_that_of_merge(base: Path, tmp_path: Path) -> None:
    deep = tiny_qwen2(tmp_path / "deep", num_hidden_layers=3)
    adapter = tiny_adapter(deep, tmp_path / "adapter", target_modules=["q_proj"])
    ended = inspect(adapter, base=base)
    assert isinstance(ended.fault, AdapterRefused)
    assert ended.fault.exit_code == 2
    assert "model.layers.2.self_attn.q_proj" in ended.fault.what
    assert ended.data["adapters"][0]["tensors"] == 6
    assert not inspect(adapter).fault


def test_changes_of_the_config_and_the_named_base_are_shown(base: Path, tmp_path: Path) -> None:
    tied = tiny_qwen2(tmp_path / "tied", tie=True)
    adapter = tiny_adapter(tied, tmp_path / "adapter", target_modules=["lm_head"])
    seen = inspect(adapter, base=tied)
    assert seen.data["config"] == {"tie_word_embeddings": False}
    assert seen.data["names_base"]["passed"]
    assert "config.json: tie_word_embeddings becomes false." in seen.view
    assert not inspect(adapter, base=base).data["names_base"]["passed"]
    refused = inspect(tiny_adapter(base, tmp_path / "activated", alora_invocation_tokens=[3]), base=base)
    assert refused.fault
    assert refused.data["declared"]["base_model_name_or_path"] == str(base)


def test_a_full_model(base: Path) -> None:
    assert inspect(base, base=base).data["kind"] == "full"
