"""Padding: Qwen's published procedure bit for bit, and the live model's function exactly."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qwen_pipeline.checkpoint import digest
from qwen_pipeline.checkpoint.digest import row_blocks
from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor, open_checkpoint
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.checkpoint.writer import write_checkpoint
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.qwen.geometry import Layout, plan_padding
from qwen_pipeline.transforms.padding import pad
from qwen_pipeline_tests.oracles import logits
from qwen_pipeline_tests.tiny import tiny_qwen2, tiny_qwen3


def published_rows(weight: torch.Tensor, pad_size: int) -> torch.Tensor:
    """Qwen's procedure for gate_proj and up_proj: r0, 0, r1, 0, ..., r[pad_size - 1], 0, then the rest."""
    zero = torch.zeros_like(weight[:1])
    woven = [part for row in range(pad_size) for part in (weight[row : row + 1], zero)]
    return torch.cat([*woven, weight[pad_size:]], dim=0)


def published_columns(weight: torch.Tensor, pad_size: int) -> torch.Tensor:
    """The same for down_proj, along the columns."""
    zero = torch.zeros_like(weight[:, :1])
    woven = [part for column in range(pad_size) for part in (weight[:, column : column + 1], zero)]
    return torch.cat([*woven, weight[:, pad_size:]], dim=1)


def mlp(width: int, hidden: int, *, biases: bool = False) -> Checkpoint:
    """One layer of random MLP weights, in memory."""
    generator = torch.Generator().manual_seed(width)
    prefix = "model.layers.0.mlp."
    shapes = {
        "gate_proj.weight": (width, hidden),
        "up_proj.weight": (width, hidden),
        "down_proj.weight": (hidden, width),
    }
    shapes |= {"gate_proj.bias": (width,), "up_proj.bias": (width,), "down_proj.bias": (hidden,)} if biases else {}
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    return Checkpoint(
        config={"model_type": "qwen2", "num_hidden_layers": 1, "hidden_size": hidden, "intermediate_size": width},
        tensors={prefix + name: lazy(tensor) for name, tensor in tensors.items()},
        shards=dict.fromkeys((prefix + name for name in tensors), "model.safetensors"),
    )


def lazy(tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor(
        spec=TensorSpec(dtype="BF16", shape=tuple(tensor.shape)), read=lambda start, stop: tensor[start:stop]
    )


def test_29568_becomes_29696_bit_for_bit_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    live = mlp(29568, 64)
    plan = plan_padding(live.config, group_size=128, tensor_parallel=8)
    padded = pad(live, plan)
    monkeypatch.setattr(digest, "BLOCK_BYTES", 100_000)  # blocks that begin and end anywhere among the woven rows

    assert padded.config == {**live.config, "intermediate_size": 29696}
    assert padded.config["hidden_size"] == 64
    for name in live:
        procedure = published_columns if "down_proj" in name else published_rows
        expected = procedure(live.load(name), 128)
        found = torch.cat(list(row_blocks(padded, name)))
        assert found.dtype == expected.dtype
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16)), name


@given(
    width=st.integers(1, 80),
    group_size=st.sampled_from([1, 4, 16]),
    tensor_parallel=st.integers(1, 5),
    layout=st.sampled_from(["interleave", "append"]),
)
def test_selecting_the_live_channels_undoes_padding(
    width: int, group_size: int, tensor_parallel: int, layout: Layout
) -> None:
    live = mlp(width, 3, biases=True)
    plan = plan_padding(live.config, group_size=group_size, tensor_parallel=tensor_parallel, layout=layout)
    padded = pad(live, plan)
    (size,) = plan.sizes
    dead = sorted(set(range(size.padded)) - set(size.positions().tolist()))

    assert padded.keys() == live.keys()
    for name, spec in live.items():
        if name.endswith("down_proj.bias"):
            assert padded[name] == spec
            continue
        axis = 1 if name.endswith("down_proj.weight") else 0
        found = padded.load(name)
        assert found.shape == padded[name].shape
        assert torch.equal(found.index_select(axis, size.positions()), live.load(name))
        assert not found.index_select(axis, torch.tensor(dead, dtype=torch.int64)).count_nonzero()


@pytest.mark.parametrize("layout", ["interleave", "append"])
@pytest.mark.parametrize("width", [96, 40], ids=["fewer zeros than channels", "more zeros than channels"])
@pytest.mark.parametrize("tiny", [tiny_qwen2, tiny_qwen3])
def test_float64_logits_stay(tmp_path: Path, tiny: Callable[..., Path], width: int, layout: Layout) -> None:
    live = open_checkpoint(tiny(tmp_path / "live", intermediate_size=width, dtype=torch.float64))
    plan = plan_padding(live.config, group_size=32, tensor_parallel=4, layout=layout)
    (tmp_path / "padded").mkdir()
    write_checkpoint(pad(live, plan), tmp_path / "padded", task="pad")

    difference = (logits(tmp_path / "padded") - logits(tmp_path / "live")).abs().max()
    assert difference < 1e-12


def test_nothing_to_pad_leaves_the_checkpoint_as_it_is(tmp_path: Path) -> None:
    live = open_checkpoint(tiny_qwen2(tmp_path, intermediate_size=128))
    padded = pad(live, plan_padding(live.config, group_size=32, tensor_parallel=4))
    assert padded is live


@pytest.mark.parametrize("fault", ["missing", "width", "two spellings"])
def test_weights_that_do_not_fit_the_config_are_named(tmp_path: Path, fault: str) -> None:
    root = tiny_qwen2(tmp_path)
    checkpoint = open_checkpoint(root)
    tensors = {name: checkpoint.load(name) for name in checkpoint}
    name = "model.layers.1.mlp.up_proj.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "width":
        tensors[name] = tensors[name][:-1].contiguous()
    else:
        tensors[name.replace("model.", "model.language_model.", 1)] = tensors[name].clone()
    save_file(tensors, root / "model.safetensors")
    plan = plan_padding(checkpoint.config, group_size=32, tensor_parallel=2)
    with pytest.raises(CheckpointRefused, match=r"layers\.1\.mlp\.up_proj\.weight"):
        pad(open_checkpoint(root), plan)
