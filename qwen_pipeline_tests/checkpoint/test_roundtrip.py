"""What the writer writes is what the reference library reads, tensor by tensor and byte by byte."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_pipeline.checkpoint import digest, writer
from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.manifest import Derivation
from qwen_pipeline.checkpoint.store import Built, Directory, derive, require_intact


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A two-shard checkpoint with an odd mix of dtypes and shapes."""
    root = tmp_path / "source"
    root.mkdir()
    shards = {
        "model-00001-of-00002.safetensors": {
            "a.weight": torch.randn(37, 5, dtype=torch.float32).bfloat16(),
            "a.scalar": torch.tensor(3.5),
        },
        "model-00002-of-00002.safetensors": {
            "b.weight": torch.randn(3, 4, 5, dtype=torch.float16),
            "b.empty": torch.empty(0, 4),
            "b.codes": torch.randint(-9, 9, (6, 2), dtype=torch.int32),
        },
    }
    for file, tensors in shards.items():
        save_file(tensors, root / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (root / "config.json").write_text('{"model_type":   "qwen2"}')
    (root / "tokenizer.json").write_text("{}")
    (root / "README.md").write_text("not carried")
    return root


def test_a_copy_has_the_same_tensors_files_and_digest(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "BLOCK_BYTES", 64)
    source = open_checkpoint(sharded)
    derivation = Derivation(stage="copy", inputs={}, spec={}, code_version="1")

    def build(partial: Path) -> Built:
        return Built(contents=writer.write_checkpoint(source, partial, task="copy"))

    copy = derive(derivation, Directory(tmp_path / "out"), build)

    for shard in set(source.shards.values()):
        expected, found = load_file(sharded / shard), load_file(copy.path / shard)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (copy.path / "config.json").read_bytes() == (sharded / "config.json").read_bytes()
    assert not (copy.path / "README.md").exists()
    assert source.left_behind == ("README.md",)
    assert copy.manifest.content_digest == digest.contents_of(source, sharded).digest
    assert require_intact(copy.path) == copy.manifest
    assert derive(derivation, Directory(tmp_path / "out"), build).reused
