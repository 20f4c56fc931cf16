"""Checkpoints of torch.distributed.checkpoint, saved by two processes with FSDP."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_saver import save

from qwen_pipeline.checkpoint.trainers.distributed import open_distributed
from qwen_pipeline.checkpoint.trainers.find import open_trained
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline_tests.tiny import tiny_qwen2

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a model and two checkpoints of it."""
    root = tmp_path_factory.mktemp("fsdp")
    tiny_qwen2(root / "model", intermediate_size=33)
    target = "qwen_pipeline_tests.checkpoint.trainers.save_with_fsdp"
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", target, str(root / "model"), str(root)], check=True, env=env)
    return root


@pytest.mark.parametrize("layout", ["nested", "flat"])
def test_every_weight_is_the_models(saved: Path, layout: str) -> None:
    trained, expected = open_trained(saved / layout), load_file(saved / "model" / "model.safetensors")
    assert trained.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        rows = [trained.tensors[name].read(start, min(start + 5, len(tensor))) for start in range(0, len(tensor), 5)]
        assert torch.equal(torch.cat(rows), tensor), name
    assert trained.unused == (["optimizer", "step"] if layout == "nested" else [])


def test_the_directory_around_it_is_searched(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "nested", tmp_path / "pytorch_model_fsdp_0")
    shutil.copytree(saved / "nested", tmp_path / "optimizer_0")
    assert open_trained(tmp_path).tensors.keys() == open_trained(saved / "nested").tensors.keys()


def test_a_missing_file_of_a_rank_is_refused(saved: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(saved / "nested", tmp_path / "nested"))
    (root / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointRefused, match=r"__1_0\.distcp"):
        open_distributed(root)


def test_an_optimizer_alone_is_no_model(tmp_path: Path) -> None:
    save({"optim": {"lr": torch.ones(3)}}, checkpoint_id=tmp_path / "optim", no_dist=True)
    with pytest.raises(CheckpointRefused, match="holds no model; it holds optim"):
        open_distributed(tmp_path / "optim")


class Hostile:
    def __reduce__(self) -> Any:
        return os.mkdir, ("mark",)


def test_hostile_metadata_are_refused_by_name(saved: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(saved / "flat", tmp_path / "flat"))
    metadata = pickle.loads((root / ".metadata").read_bytes())
    metadata.planner_data = Hostile()
    (root / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointRefused, match=r"posix\.mkdir"):
        open_distributed(root)
    assert not Path("mark").exists()


def test_chunks_that_overlap_or_lack_values_are_refused(saved: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(saved / "flat", tmp_path / "flat"))
    metadata = pickle.loads((root / ".metadata").read_bytes())
    name = "model.norm.weight"
    del metadata.state_dict_metadata[name].chunks[1]
    (root / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointRefused, match=rf"{name}: its chunks have"):
        open_distributed(root)
