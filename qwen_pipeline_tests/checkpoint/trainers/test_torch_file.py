"""Files of torch.save: the tensors of ``torch.load``, and nothing that a hostile pickle asks for."""

import io
import os
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_pipeline.checkpoint.trainers.torch_file import StoredView, open_torch_file
from qwen_pipeline.errors import CheckpointRefused


def values() -> dict[str, Any]:
    base = torch.arange(35, dtype=torch.float32).reshape(5, 7)
    layer = torch.nn.Linear(3, 4)
    layer.weight.note = 1  # pyright: ignore[reportAttributeAccessIssue]
    return OrderedDict(
        whole=base,
        rows=base[1:4],
        transposed=base.T,
        column=base[:, 2],
        expanded=torch.arange(12.0).reshape(3, 1, 4).expand(3, 5, 4),
        scalar=torch.tensor(3.0),
        empty=torch.empty(0, 3),
        parameter=layer.weight,
        booleans=torch.tensor([True, False]),
        unsigned=torch.tensor([1, 60000], dtype=torch.uint16),
        floats8=torch.arange(4.0).to(torch.float8_e4m3fn),
        half=torch.arange(4.0).half(),
        brain=torch.arange(4.0).bfloat16(),
        longs=torch.tensor([[-1, 2**40]]),
    )


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_every_tensor_has_the_bytes_of_torch_load(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(values(), path, pickle_protocol=protocol)
    expected, found = torch.load(path, weights_only=False), open_torch_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same(found[name], tensor.detach())
    assert found["whole"].storage == found["rows"].storage


def assert_same(view: StoredView, expected: torch.Tensor) -> None:
    lazy = view.lazy()
    found = lazy.read(0, lazy.spec.rows)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.numpy(force=True).tobytes() == expected.contiguous().numpy().tobytes() if _has_numpy(found) else True
    assert torch.equal(found.double(), expected.double())
    if expected.dim() and len(expected) > 2:
        assert torch.equal(lazy.read(1, 3).double(), expected[1:3].double())


def _has_numpy(tensor: torch.Tensor) -> bool:
    return tensor.dtype not in (torch.bfloat16, torch.float8_e4m3fn)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_view_is_read_by_rows(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    tensor = tensor.permute(data.draw(st.permutations(range(len(shape)))))
    start = data.draw(st.integers(0, len(tensor) - 1))
    tensor = tensor[start : data.draw(st.integers(start + 1, len(tensor)))]
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"view-{os.getpid()}.pt"
    torch.save([tensor], path)
    (view,) = open_torch_file(path)
    low = data.draw(st.integers(0, len(tensor)))
    high = data.draw(st.integers(low, len(tensor)))
    assert torch.equal(view.load(low, high), tensor[low:high])


def test_other_values_are_data(tmp_path: Path) -> None:
    path = tmp_path / "states.pt"
    states = {"step": 3, "betas": (0.9, 0.99), "dtype": torch.float16, "shape": torch.Size([2, 3])}
    torch.save(states | {"random": np.arange(3), "loss": np.float64(0.5), "counts": defaultdict(int)}, path)
    found = open_torch_file(path)
    assert (found["step"], found["betas"], found["shape"]) == (3, (0.9, 0.99), (2, 3))


class Calls:
    """Pickled as a call of a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("name", "function", "args"),
    [
        (f"{os.name}.mkdir", os.mkdir, ("{}",)),
        ("builtins.eval", eval, ("open('{}', 'w').close()",)),
        ("builtins.exec", exec, ("open('{}', 'w').close()",)),
        ("builtins.getattr", getattr, ("{}", "upper")),
        ("pathlib.Path", Path, ("{}",)),
    ],
)
def test_a_hostile_pickle_is_refused_by_name_and_not_run(
    name: str, function: Callable[..., Any], args: tuple[str, ...], protocol: int, tmp_path: Path
) -> None:
    path, mark = tmp_path / "weights.pt", tmp_path / "mark"
    hostile = Calls(function, *(arg.format(mark) for arg in args))
    torch.save({"weight": torch.ones(2), "x": hostile}, path, pickle_protocol=protocol)
    with pytest.raises(CheckpointRefused, match=name.replace("pathlib.Path", r"pathlib\S*Path")):
        open_torch_file(path)
    assert not mark.exists()
    if name == "posix.mkdir":
        torch.load(path, weights_only=False)
        assert mark.exists(), "the pickle would not have done anything"


def with_pickle(path: Path, data: bytes) -> Path:
    """Write a file of torch.save whose pickle is ``data``."""
    torch.save({"weight": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, data if name.endswith("/data.pkl") else content)
    return path


@pytest.mark.parametrize(
    "data",
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n}X\x05\x00\x00\x00_callcposix\nsystem\nsb.",
        b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x05\x00\x00\x00_callNs\x86b.",
        b"ccollections\nOrderedDict\nN}X\x04\x00\x00\x00move}s\x86b.",
        b"cdeepspeed.x\nY\nN}X\x07\x00\x00\x00__new__}s\x86b.",
        b"\x80\x02}(X\x01\x00\x00\x00a",
        b"",
    ],
    ids=["other function", "stand-in", "container", "class", "cut off", "empty"],
)
def test_a_pickle_cannot_change_its_reader(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointRefused):
        open_torch_file(with_pickle(tmp_path / "bad.pt", data))
    torch.save(values(), tmp_path / "good.pt")
    assert_same(open_torch_file(tmp_path / "good.pt")["rows"], values()["rows"])
    assert not hasattr(OrderedDict, "move")


def test_a_tensor_outside_of_its_storage_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        data = next(archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))
    assert data.count(b"K\x02\x85") == 1, "the shape (2,)"
    with pytest.raises(CheckpointRefused, match="does not fit its storage"):
        open_torch_file(with_pickle(tmp_path / "bad.pt", data.replace(b"K\x02\x85", b"K\x09\x85")))


def test_a_file_that_shrinks_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.ones(10_000)}, path)
    view = open_torch_file(path)["weight"]
    with path.open("rb+") as file:
        file.truncate(20_000)
    with pytest.raises(CheckpointRefused, match="ends at byte 20,000"):
        view.load(0, 10_000)


def test_older_and_other_formats_are_named(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"weight": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointRefused, match=r"since version 1\.6"):
        open_torch_file(path)
    path.write_bytes(pickle.dumps({"weight": 1}))
    with pytest.raises(CheckpointRefused, match=r"since version 1\.6"):
        open_torch_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "x")
    with pytest.raises(CheckpointRefused, match=r"data\.pkl"):
        open_torch_file(path)
