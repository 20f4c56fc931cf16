"""ZeRO checkpoints that DeepSpeed 0.19.8 saved on three ranks: the tensors of its own ``zero_to_fp32``."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen_pipeline.checkpoint.trainers.deepspeed import open_zero
from qwen_pipeline.checkpoint.trainers.find import open_trained
from qwen_pipeline.errors import CheckpointRefused

ZERO = Path(__file__).with_name("zero")
KINDS = ("zero1", "zero2", "zero3", "zero3-lora")


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_the_one_of_zero_to_fp32(kind: str) -> None:
    trained, expected = open_trained(ZERO / kind), load_file(ZERO / kind / "expected.safetensors")
    assert trained.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        lazy = trained.tensors[name]
        assert (lazy.spec.torch_dtype, lazy.spec.shape) == (tensor.dtype, tuple(tensor.shape)), name
        rows = [lazy.read(row, row + 1) for row in range(lazy.spec.rows)]
        assert torch.equal(torch.cat(rows), tensor), name
    assert f"ZeRO-{kind[4]} of 3 ranks" in trained.layout


def test_tied_and_frozen_parameters_are_known() -> None:
    trained = open_trained(ZERO / "zero2")
    assert trained.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert trained.frozen == {"model.norm.weight", "model.layers.0.mlp.up_proj.weight"}
    assert trained.tensors["model.norm.weight"].spec.dtype == "BF16"


def test_without_the_optimizers_states_the_weights_of_the_training_are_taken(tmp_path: Path) -> None:
    root = Path(shutil.copytree(ZERO / "zero2", tmp_path / "zero2"))
    for path in root.rglob("*_optim_states.pt"):
        path.unlink()
    trained, expected = open_trained(root), load_file(root / "expected.safetensors")
    assert trained.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(trained.tensors[name].read(0, len(tensor)), tensor.bfloat16()), name


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
@pytest.mark.parametrize("states", ["optim", "model"])
def test_a_missing_rank_is_refused(kind: str, states: str, tmp_path: Path) -> None:
    root = Path(shutil.copytree(ZERO / kind / "global_step2", tmp_path / "global_step2"))
    sorted(root.glob(f"*_{states}_states.pt"))[-1].unlink()
    with pytest.raises(CheckpointRefused, match=r"3 ranks|no weights"):
        open_trained(root)


def test_ranks_of_another_training_are_refused(tmp_path: Path) -> None:
    root = Path(shutil.copytree(ZERO / "zero3" / "global_step2", tmp_path / "global_step2"))
    (name,) = (path.name for path in root.glob("*_rank_1_*_optim_states.pt"))
    shutil.copy(ZERO / "zero3-lora" / "global_step2" / name, root / name)
    with pytest.raises(CheckpointRefused, match="not a valid checkpoint"):
        open_zero(root)


def test_other_kinds_of_parallelism_are_refused(tmp_path: Path) -> None:
    root = Path(shutil.copytree(ZERO / "zero2" / "global_step2", tmp_path / "global_step2"))
    (root / "mp_rank_01_model_states.pt").touch()
    with pytest.raises(CheckpointRefused, match="split layers or experts"):
        open_zero(root)


def test_latest_names_the_step(tmp_path: Path) -> None:
    root = Path(shutil.copytree(ZERO / "zero2", tmp_path / "zero2"))
    shutil.copytree(ZERO / "zero3" / "global_step2", root / "global_step1")
    assert "ZeRO-2" in open_trained(root).layout
    (root / "latest").unlink()
    with pytest.raises(CheckpointRefused, match=r"several.*global_step1/; global_step2/"):
        open_trained(root)
