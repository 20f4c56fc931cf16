"""Damage anywhere in a trainer's checkpoint is refused, or leaves weights that can be read; it is never a crash."""

import random
import shutil
from pathlib import Path

import pytest
import torch

from qwen_pipeline.checkpoint.trainers.find import open_trained
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline_tests.checkpoint.trainers.test_deepspeed import KINDS, ZERO

READABLE_BYTES = 10**7
"""A damaged shape may be large: such tensors are not read here."""


def damaged(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 3))):
        at = chance.randrange(len(changed))
        match chance.randrange(3):
            case 0:
                changed[at] = chance.randrange(256)
            case 1:
                del changed[at : at + chance.randrange(1, 9)]
            case _:
                changed[at:at] = chance.randbytes(3)
    return bytes(changed)


@pytest.mark.parametrize("source", ["state dict", *KINDS])
def test_damage_is_refused_or_harmless(source: str, tmp_path: Path) -> None:
    chance, root = random.Random(source), tmp_path / "checkpoint"
    if source == "state dict":
        root.mkdir()
        torch.save({"a": torch.ones(3, 4), "b": torch.ones(2).half(), "step": 3}, root / "pytorch_model.bin")
    else:
        shutil.copytree(ZERO / source, root)
    files = [path for path in sorted(root.rglob("*")) if path.suffix in (".pt", ".bin")]
    refusals = 0
    for _ in range(40):
        path = chance.choice(files)
        original = path.read_bytes()
        path.write_bytes(damaged(original, chance))
        try:
            for tensor in open_trained(root).tensors.values():
                if tensor.spec.nbytes < READABLE_BYTES:
                    tensor.read(0, tensor.spec.rows)
        except CheckpointRefused:
            refusals += 1
        path.write_bytes(original)
    assert refusals > 5
    assert open_trained(root).tensors
