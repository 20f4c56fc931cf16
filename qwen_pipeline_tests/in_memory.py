"""Checkpoints whose tensors are in memory, and tensors read in blocks as the writer reads them."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from qwen_pipeline.checkpoint import digest
from qwen_pipeline.checkpoint.digest import block_ranges
from qwen_pipeline.checkpoint.dtypes import TORCH_DTYPES
from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    (dtype,) = (name for name, dtype in TORCH_DTYPES.items() if dtype == tensor.dtype)
    return TensorSpec(dtype=dtype, shape=tuple(tensor.shape))


def lazy(tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor(spec=spec_of(tensor), read=lambda start, stop: tensor[start:stop])


def checkpoint_of(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], *, shard: str = "model.safetensors"
) -> Checkpoint:
    """Return a checkpoint of one shard."""
    return Checkpoint(
        config=config,
        tensors={name: lazy(tensor) for name, tensor in tensors.items()},
        shards=dict.fromkeys(tensors, shard),
    )


def random_mlp(width: int, hidden: int, *, biases: bool = False) -> Checkpoint:
    """Return one layer of random MLP weights."""
    shapes = {
        "gate_proj.weight": (width, hidden),
        "up_proj.weight": (width, hidden),
        "down_proj.weight": (hidden, width),
    }
    shapes |= {"gate_proj.bias": (width,), "up_proj.bias": (width,), "down_proj.bias": (hidden,)} if biases else {}
    config = {"model_type": "qwen2", "intermediate_size": width}
    return _random({f"model.layers.0.mlp.{name}": shape for name, shape in shapes.items()}, config, hidden, seed=width)


def random_stack(width: int, hidden: int, experts: int, *, transposed: bool) -> Checkpoint:
    """Return one layer of random experts, stored in stacks."""
    shapes = {"gate_up_proj": (experts, 2 * width, hidden), "down_proj": (experts, hidden, width)}
    if transposed:
        shapes = {name: (experts, inputs, outputs) for name, (_, outputs, inputs) in shapes.items()}
    config = {"model_type": "qwen3_moe", "moe_intermediate_size": width, "num_experts": experts}
    names = {f"model.layers.0.mlp.experts.{name}": shape for name, shape in shapes.items()}
    return _random(names, config, hidden, seed=width)


def _random(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], hidden: int, *, seed: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    return checkpoint_of(tensors, {**config, "num_hidden_layers": 1, "hidden_size": hidden})


@contextmanager
def blocks_of(nbytes: int) -> Generator[None]:
    """Compute tensors in blocks of at most ``nbytes``, or of one row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "BLOCK_BYTES", nbytes)
        yield


def read_in_blocks(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Read a tensor in the blocks of rows that the writer computes."""
    return torch.cat([checkpoint.tensors[name].read(start, stop) for start, stop in block_ranges(checkpoint[name])])


def loaded(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint with all its tensors read in blocks, which must have the stated shapes."""
    tensors = {name: read_in_blocks(checkpoint, name) for name in checkpoint}
    assert all(tensors[name].shape == spec.shape for name, spec in checkpoint.items())
    return checkpoint.replace(tensors={name: lazy(tensor) for name, tensor in tensors.items()})
