"""Headers and rows are read exactly; a malicious or damaged directory is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qwen_pipeline.checkpoint.dtypes import TORCH_DTYPES
from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.safetensors_file import header_bytes, open_safetensors
from qwen_pipeline.errors import CheckpointRefused

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("dtype", TORCH_DTYPES.values(), ids=str)
def test_every_dtype_is_read_as_the_reference_library_reads_it(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.randint(0, 2, (7, 3)).to(dtype)
    save_file({"t": tensor}, tmp_path / "t.safetensors")

    opened = open_safetensors(tmp_path / "t.safetensors")

    assert torch.equal(opened.load("t").view(torch.uint8), tensor.view(torch.uint8))
    assert torch.equal(opened.load("t", 2, 5).view(torch.uint8), tensor[2:5].view(torch.uint8))


@given(shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=5))
def test_our_headers_are_read_by_the_reference_library(
    shapes: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensors = {f"t{i}": torch.rand(shape) for i, shape in enumerate(shapes)}
    path = tmp_path_factory.mktemp("header") / "t.safetensors"
    save_file(tensors, path)
    opened = open_safetensors(path)
    ours = path.with_name("ours.safetensors")
    ours.write_bytes(header_bytes(opened.specs) + b"".join(opened.load(n).numpy().tobytes() for n in opened.specs))

    assert all(torch.equal(found, tensors[name]) for name, found in load_file(ours).items())
    assert load_file(ours).keys() == tensors.keys()


@given(position=st.integers(0, 400), value=st.integers(0, 255))
@settings(deadline=None, max_examples=300)
def test_a_damaged_header_is_refused_or_means_the_same_bytes(
    position: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """After a change of one byte, the file is refused, or its tensors lie within it."""
    path = tmp_path_factory.mktemp("damage") / "t.safetensors"
    save_file({"a": torch.rand(4, 4), "b": torch.rand(2, 3)}, path)
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    path.write_bytes(data)

    try:
        opened = open_safetensors(path)
    except CheckpointRefused:
        return
    assert sum(opened.load(name).nbytes for name in opened.specs) <= len(data)


def test_a_truncated_file_is_refused(sharded: Path) -> None:
    shard = sharded / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])

    with pytest.raises(CheckpointRefused, match=r"model-00001.*the file has"):
        open_checkpoint(sharded)


def test_a_file_truncated_after_it_was_opened_is_an_error_not_a_crash(sharded: Path) -> None:
    opened = open_checkpoint(sharded)
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:300])

    with pytest.raises(CheckpointRefused, match="before the tensor's last byte"):
        opened.load(list(opened)[-1])


def rewrite_index(root: Path, **changes: str | None) -> None:
    index = json.loads((root / INDEX).read_text())
    index["weight_map"].update(changes)
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file is not None}
    (root / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "weights.bin"])
def test_a_shard_outside_the_directory_is_refused(sharded: Path, file: str) -> None:
    rewrite_index(sharded, **{"a.weight": file})

    with pytest.raises(CheckpointRefused, match="not a plain"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"ghost.weight": "model-00001-of-00002.safetensors"}, "'ghost.weight'"),
        ({"a.weight": None}, "'a.weight'"),
        ({"a.weight": "model-00002-of-00002.safetensors"}, "'a.weight'"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(
    sharded: Path, changes: dict[str, str | None], named: str
) -> None:
    rewrite_index(sharded, **changes)

    with pytest.raises(CheckpointRefused, match=named):
        open_checkpoint(sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()

    with pytest.raises(CheckpointRefused, match=r"model-00002-of-00002\.safetensors is missing"):
        open_checkpoint(sharded)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")

    with pytest.raises(CheckpointRefused, match=r"pickled weights \(pytorch_model\.bin\)"):
        open_checkpoint(tmp_path)


def test_two_sets_of_weights_are_refused(sharded: Path) -> None:
    save_file({"a": torch.ones(1)}, sharded / "model.safetensors")

    with pytest.raises(CheckpointRefused, match="has both"):
        open_checkpoint(sharded)


def test_rows_are_slices_of_the_first_axis(sharded: Path) -> None:
    opened = open_checkpoint(sharded)
    whole = opened.load("b.weight")

    assert torch.equal(opened.load("b.weight", slice(1, None)), whole[1:])
    assert opened.load("a.scalar").item() == 3.5
    assert opened.load("b.empty").shape == (0, 4)
    with pytest.raises(ValueError, match="contiguous"):
        opened.load("b.weight", slice(0, 3, 2))
