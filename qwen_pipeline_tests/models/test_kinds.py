"""Directories are recognized by what trainers really leave in them; what cannot be merged is refused by its kind."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.models.inbox import Arrival
from qwen_pipeline.models.kinds import KINDS, TRACES, recognize, require_kind
from qwen_pipeline.models.open import open_fine_tune

Content = Mapping[str, Any] | str | None
"""The fields of a JSON file, a text, or None for a file of weights."""

PEFT = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
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
    "gguf": ("GGUF files", {"model-q4_k_m.gguf": None}, set()),
}
REFUSED = {
    "mlx": "mlx_lm.fuse",
    "mlx without weights": "mlx_lm.fuse",
    "zero": "qwen-pipeline convert --from",
    "fsdp": "qwen-pipeline convert --from",
    "verl": "qwen-pipeline convert --from",
    "output directory": "checkpoint-100",
    "gguf": "full-precision",
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
    with pytest.raises(InputRefused, match="is not a directory"):
        open_fine_tune(tmp_path / "nowhere")


def test_every_kind_and_every_tool_is_tested() -> None:
    assert {kind.name for kind in KINDS} == {kind for kind, _, _ in DIRECTORIES.values()}
    seen = {tool.partition(" 0")[0].partition(" 5")[0] for _, _, tools in DIRECTORIES.values() for tool in tools}
    assert {trace.tool for trace in TRACES} - seen == {"Axolotl", "this pipeline"}
