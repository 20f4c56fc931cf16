"""A small checkpoint with unusual tensors, for the tests of this package."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards with a mix of dtypes and shapes, a tokenizer, and a file that is not carried along."""
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
