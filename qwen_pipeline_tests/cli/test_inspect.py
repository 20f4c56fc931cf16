"""``inspect`` describes a fine-tune, the tensors that it changes, and why it would be refused."""

import json
import re
import resource
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from qwen_pipeline.cli.inspect import inspect
from qwen_pipeline.cli.results import CommandResult
from qwen_pipeline.errors import AdapterRefused, CheckFailed, PipelineError
from qwen_pipeline.models.base_names import KnownBase
from qwen_pipeline.models.examine import require_mergeable
from qwen_pipeline.stages.merge import merge
from qwen_pipeline.transforms.lora.adapter import ADAPTER_CONFIG
from qwen_pipeline.transforms.lora.saved.weights import ADAPTER_WEIGHTS
from qwen_pipeline_tests.cli.terminal import qwen_pipeline
from qwen_pipeline_tests.hollow import hollow_model
from qwen_pipeline_tests.tiny import tiny_adapter, tiny_qwen2, tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("base"))


def printed(result: CommandResult) -> str:
    console = Console(record=True, file=StringIO(), width=120)
    for part in result.view:
        console.print(part, markup=False)
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


def test_a_tokenizer_with_tokens_that_have_no_row_is_refused_before_a_merge(tmp_path: Path) -> None:
    small = tiny_qwen2(tmp_path / "base", vocab_size=259)
    adapter, tuned = tiny_adapter(small, tmp_path / "adapter"), tiny_qwen2(tmp_path / "tuned", vocab_size=259, seed=3)
    for root in (adapter, tuned):
        assert not inspect(root, base=small).fault
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["<|extra|>"])
        tokenizer.save_pretrained(root)
        seen = inspect(root, base=small)
        assert isinstance(seen.fault, CheckFailed)
        assert seen.fault.what == (
            "tokenizer_fits: The embedding has 259 rows, but none for 1 tokens of the tokenizer: 259 '<|extra|>'."
        )
        with pytest.raises(CheckFailed, match="tokenizer_fits"):
            require_mergeable(root, KnownBase(root=small))


def test_what_the_weights_settle_is_shown(base: Path, tmp_path: Path) -> None:
    tuned = tiny_qwen2(tmp_path / "tuned", seed=3)
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    expected = "dtype bfloat16: the decoder's weights are stored so"
    assert inspect(tuned, base=base).data["settled"] == [expected]
    assert f"Settled by the stored weights: {expected}." in printed(inspect(tuned, base=base))
    adapter = tiny_adapter(base, tmp_path / "adapter")
    assert inspect(adapter, base=tuned).data["settled"] == [f"in the base, {expected}"]


def test_the_reason_and_the_remedy_of_the_inbox_are_shown(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tiny_adapter(base, tmp_path / "adapter")
    _settings(base_model_name_or_path="other/name")(adapter)
    file = tmp_path / "qwen_pipeline.toml"
    file.write_text(f'[bases.one]\nmodel = "{base}"\n[bases.two]\nmodel = "two"\n')
    monkeypatch.setenv("QWEN_PIPELINE_CONFIG", str(file))
    seen = " ".join(printed(inspect(adapter)).split())
    assert "In the inbox it would be quarantined: It is an adapter of 'other/name'" in seen
    assert f"Add the base to {file}, in a section [bases.NAME]" in seen
    file.write_text(f'[bases.one]\nmodel = "{base}"\nnames = ["other/*"]\n[bases.two]\nmodel = "two"\n')
    assert "In the inbox it becomes: adapter." in printed(inspect(adapter))


def test_a_full_model(base: Path, tmp_path: Path) -> None:
    (tuned := tiny_qwen2(tmp_path / "tuned", seed=3)).joinpath("optimizer.pt").write_bytes(b"state")
    seen = inspect(tuned, base=base)
    assert (seen.data["kind"], seen.data["is"], seen.data["taken"]) == (
        "full",
        "a whole model",
        len(load_file(_file(base))),
    )
    assert seen.data["carried_over"] == []
    assert "left behind: state for resuming the training" in printed(seen)


def _file(root: Path) -> Path:
    return root / "model.safetensors"


def _settings(**fields: Any) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        (root / ADAPTER_CONFIG).write_text(json.dumps(json.loads((root / ADAPTER_CONFIG).read_text()) | fields))

    return edit


def _renamed(root: Path) -> None:
    tensors = load_file(root / ADAPTER_WEIGHTS)
    save_file({name.replace("q_proj", "q_proj.mystery"): t for name, t in tensors.items()}, root / ADAPTER_WEIGHTS)


def _emptied(root: Path) -> None:
    tensors = load_file(root / ADAPTER_WEIGHTS)
    save_file({name: torch.empty(0) for name in tensors}, root / ADAPTER_WEIGHTS)


def _pickled(root: Path) -> None:
    torch.save(load_file(root / ADAPTER_WEIGHTS), root / "adapter_model.bin")
    (root / ADAPTER_WEIGHTS).unlink()


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "weights beside it": lambda root: save_file({"a": torch.ones(1)}, root / "vit.safetensors"),
    "scaling of zero": _settings(lora_alpha=0),
    "another method": _settings(peft_type="LOHA"),
    "unknown setting": _settings(setting_of_tomorrow=True),
    "another rank": _settings(r=5),
    "names": _renamed,
    "empty": _emptied,
    "pickled": _pickled,
    "mlx": lambda root: (root / ADAPTER_WEIGHTS).rename(root / "adapters.safetensors"),
    "two saves": lambda root: (root / f"{ADAPTER_WEIGHTS}.index.json").write_text("{}"),
    "no weights": lambda root: (root / ADAPTER_WEIGHTS).unlink(),
    "a model too": lambda root: save_file({"a": torch.ones(1)}, root / "model.safetensors"),
    "nothing": lambda root: [path.unlink() for path in root.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_inspect_and_merge_say_the_same_and_write_nothing(base: Path, tmp_path: Path, damage: str) -> None:
    adapter = tiny_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    DAMAGES[damage](adapter)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    seen = inspect(adapter, base=base)
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
    with pytest.raises(PipelineError) as refusal:
        merge(base=base, fine_tune=adapter, destination=tmp_path / "merged")
    assert str(seen.fault) == str(refusal.value)
    assert type(seen.fault) is type(refusal.value)
    assert seen.data["is"] in printed(seen)


def test_weights_are_left_behind_on_request(base: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    save_file({"a": torch.ones(1)}, adapter / "vit.safetensors")
    assert "REFUSED: weights that a merge does not read" in printed(inspect(adapter))
    seen = inspect(adapter, base=base, leave_behind=["*.safetensors"])
    assert seen.fault is None
    (files,) = seen.data["files"]
    assert files["left_behind"] == {"README.md": "a document", "vit.safetensors": "on request"}
    assert files["read"] == [ADAPTER_CONFIG, ADAPTER_WEIGHTS]


def test_a_model_of_72b_is_described_from_its_headers(tmp_path: Path) -> None:
    base, tuned = (hollow_model(tmp_path / name) for name in ("base", "tuned"))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = qwen_pipeline("inspect", tuned, "--base", base, "--json", env={"PYTHONPROFILEIMPORTTIME": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (ended.code, ended.data["taken"], ended.data["carried_over"]) == (0, ended.data["tensors"], [])
    assert ended.data["bytes"] > 145e9
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert not re.search(r"\| +(torch|numpy|transformers)$", ended.err, re.MULTILINE)
