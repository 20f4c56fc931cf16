"""Directories are recognized by what trainers really leave in them; what cannot be merged is refused by its kind."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.models.inbox import Arrival
from qwen_pipeline.models.kinds import KINDS, TRACES, recognize, require_kind
from qwen_pipeline.models.open import open_fine_tune
from qwen_pipeline.stages.merge import merge
from qwen_pipeline_tests.tiny import tiny_qwen3

pytestmark = pytest.mark.lengthy

Content = Mapping[str, Any] | str | None
"""The fields of a JSON file, a text, or None for a file of weights."""

SAVED_BY = Path(__file__).with_name("saved_by")
PEFT = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
ADAPTER: dict[str, Content] = {"adapter_config.json": PEFT, "adapter_model.safetensors": None}
MODEL = {"model_type": "qwen3", "transformers_version": "5.2.0"}
MLX = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 8, "scale": 20.0}}

DIRECTORIES: dict[str, tuple[str, dict[str, Content], set[str]]] = {
    "peft": (
        "an adapter",
        {"adapter_config.json": {**PEFT, "peft_version": "0.18.1"}, "adapter_model.safetensors": None},
        {"PEFT 0.18.1"},
    ),
    "unsloth": (
        "an adapter",
        {
            "adapter_config.json": {**PEFT, "auto_mapping": {"unsloth_fixed": True}},
            "adapter_model.safetensors": None,
            "README.md": "---\nlibrary_name: peft\ntags:\n- trl\n- sft\n---\n",
        },
        {"PEFT", "Unsloth", "TRL"},
    ),
    "swift checkpoint": (
        "an adapter",
        {
            "adapter_config.json": PEFT,
            "adapter_model.safetensors": None,
            "args.json": {},
            "trainer_state.json": {},
            "optimizer.pt": None,
        },
        {"PEFT", "ms-swift", "the Trainer of Transformers"},
    ),
    "llama-factory": (
        "an adapter",
        {
            "adapter_config.json": PEFT,
            "adapter_model-00001-of-00002.safetensors": None,
            "README.md": "tags:\n- llama-factory\n",
            "trainer_log.jsonl": "{}",
        },
        {"PEFT", "LLaMA-Factory"},
    ),
    "mlx": ("an adapter of MLX", {"adapter_config.json": MLX, "adapters.safetensors": None}, {"MLX"}),
    "mlx without weights": ("an adapter of MLX", {"adapter_config.json": MLX}, {"MLX"}),
    "set": ("a set of adapters", {"adapters.toml": "", "a/adapter_config.json": PEFT}, set()),
    "whole": ("a whole model", {"config.json": MODEL, "model.safetensors": None}, {"Transformers 5.2.0"}),
    "merged": (
        "a whole model",
        {"config.json": MODEL, "model.safetensors": None, "adapter_config.json": PEFT},
        {"PEFT", "Transformers 5.2.0"},
    ),
    "adapter without weights": ("an adapter", {"adapter_config.json": PEFT}, {"PEFT"}),
    "text only": (
        "a text-only model",
        {"config.json": {**MODEL, "model_type": "qwen3_5_text"}, "model.safetensors": None},
        {"Transformers 5.2.0"},
    ),
    "sentence transformers": (
        "a model of Sentence Transformers",
        {
            "config.json": MODEL,
            "modules.json": "[]",
            "model.safetensors": None,
            "config_sentence_transformers.json": {},
        },
        {"Sentence Transformers", "Transformers 5.2.0"},
    ),
    "zero": (
        "a sharded checkpoint of DeepSpeed",
        {
            "config.json": MODEL,
            "global_step9/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": None,
            "zero_to_fp32.py": "",
        },
        {"DeepSpeed", "Transformers 5.2.0"},
    ),
    "fsdp": (
        "a sharded checkpoint of FSDP",
        {"config.json": MODEL, "pytorch_model_fsdp_0/__0_0.distcp": None},
        {"FSDP", "Transformers 5.2.0"},
    ),
    "verl": (
        "a sharded checkpoint of verl",
        {"actor/model_world_size_2_rank_0.pt": None, "actor/huggingface/config.json": MODEL},
        {"verl"},
    ),
    "output directory": (
        "an output directory of a trainer",
        {"checkpoint-10/adapter_config.json": PEFT, "checkpoint-10/adapter_model.safetensors": None},
        set(),
    ),
    "gguf": ("a directory of GGUF files", {"model-q4_k_m.gguf": None}, set()),
    "settings lost": ("an adapter without its settings", {"adapter_model.safetensors": None}, set()),
    "config lost": ("a model without its config", {"model-00001-of-00002.safetensors": None}, set()),
    "cache": (
        "a folder of a hub's cache",
        {"snapshots/0a1b/config.json": MODEL, "snapshots/0a1b/model.safetensors": None, "refs/main": "0a1b"},
        set(),
    ),
    "models": ("a directory of models", {"best/config.json": MODEL, "best/model.safetensors": None}, set()),
    "megatron": (
        "a checkpoint of Megatron",
        {"latest_checkpointed_iteration.txt": "100", "iter_0000100/__0_0.distcp": None},
        {"FSDP"},
    ),
    "megatron, one iteration": ("a checkpoint of Megatron", {"mp_rank_00/model_optim_rng.pt": None}, set()),
    "archive": ("an archive", {"lora.tar.gz": "x"}, set()),
    "adapters": (
        "a directory of adapters",
        {f"{name}/{file}": content for name in "ab" for file, content in ADAPTER.items()},
        set(),
    ),
}
REFUSED = {
    "mlx": "mlx_lm.fuse",
    "mlx without weights": "mlx_lm.fuse",
    "zero": "qwen-pipeline convert --from",
    "fsdp": "qwen-pipeline convert --from",
    "verl": "qwen-pipeline convert --from",
    "output directory": "/checkpoint-10.",
    "gguf": "full-precision",
    "settings lost": "PEFT saves it beside the weights",
    "config lost": "Fetch it too",
    "cache": "/snapshots/0a1b.",
    "models": "/best.",
    "megatron": "--to_hf true",
    "megatron, one iteration": "--to_hf true",
    "archive": "Unpack it",
    "adapters": "adapters.toml",
}


def written(root: Path, files: Mapping[str, Content]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            save_file({"a": torch.ones(2)}, root / name)
        else:
            (root / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return root


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_is_recognized_with_the_tools_that_saved_it(tmp_path: Path, name: str) -> None:
    kind, files, tools = DIRECTORIES[name]
    found = recognize(written(tmp_path, files))
    assert found.kind.name == kind
    assert set(found.tools) == tools
    assert (found.kind.refusal is not None) == (name in REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_refused_by_its_kind(tmp_path: Path, name: str) -> None:
    kind, files, _ = DIRECTORIES[name]
    with pytest.raises(InputRefused, match=kind) as refusal:
        open_fine_tune(written(tmp_path, files))
    assert REFUSED[name] in refusal.value.remedy
    assert kind in str(Arrival("upload", tmp_path).obstacle())


def test_an_unknown_directory_is_refused_with_its_files(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"none of the known kinds; it has holiday\.jpg"):
        require_kind(written(tmp_path, {"holiday.jpg": "content"}))
    with pytest.raises(InputRefused, match="does not exist"):
        open_fine_tune(tmp_path / "nowhere")
    with pytest.raises(InputRefused, match="is a file") as refusal:
        open_fine_tune(tmp_path / "holiday.jpg")
    assert str(tmp_path) in refusal.value.remedy


def test_pointers_of_git_lfs_are_told_from_damaged_files(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        root = written(tmp_path / name, {**ADAPTER, name: pointer})
        with pytest.raises(InputRefused, match="pointer of Git LFS") as refusal:
            open_fine_tune(root)
        assert "git lfs pull" in refusal.value.remedy


WRITERS = {
    "ms-swift": "ms-swift",
    "llama-factory": "LLaMA-Factory",
    "trl": "TRL",
    "sentence-transformers": "Sentence Transformers",
    "peft-0.13": "PEFT",
    "peft-0.17": "PEFT",
}
"""Directory of a real save -> the tool whose traces are in it."""
BESIDE = ("optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin", "checkpoint-2/optimizer.pt")


@pytest.mark.parametrize("writer", WRITERS)
def test_what_a_tool_really_saved_is_merged_as_peft_merges_it(writer: str, tmp_path: Path) -> None:
    base, root = tiny_qwen3(tmp_path / "base"), Path(shutil.copytree(SAVED_BY / writer, tmp_path / writer))
    written(root, dict.fromkeys(BESIDE))
    found = recognize(root)
    assert (found.kind.name, found.kind.refusal) == ("an adapter", None)
    assert WRITERS[writer] in found.tools
    merged = open_checkpoint(merge(base=base, fine_tune=root, destination=tmp_path / "merged").path)
    kind = AutoModel if writer == "sentence-transformers" else AutoModelForCausalLM
    model: Any = kind.from_pretrained(base, dtype=torch.float32)
    expected: Any = PeftModel.from_pretrained(model, str(SAVED_BY / writer)).merge_and_unload().state_dict()
    assert {name.removeprefix("model.") for name in merged} == {name.removeprefix("model.") for name in expected}
    ours = {name.removeprefix("model."): merged.load(name).float() for name in merged}
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name.removeprefix("model.")], tensor, rtol=2**-8, atol=1e-6)  # one rounding
    assert not torch.equal(
        ours["layers.0.mlp.down_proj.weight"], open_checkpoint(base).load("model.layers.0.mlp.down_proj.weight").float()
    )


def test_every_kind_and_every_tool_is_tested() -> None:
    assert {kind.name for kind in KINDS} == {kind for kind, _, _ in DIRECTORIES.values()}
    seen = {tool.partition(" 0")[0].partition(" 5")[0] for _, _, tools in DIRECTORIES.values() for tool in tools}
    assert {trace.tool for trace in TRACES} - seen == {"Axolotl", "this pipeline"}
