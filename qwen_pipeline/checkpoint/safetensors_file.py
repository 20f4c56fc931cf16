"""One safetensors file: its header is read at once, its bytes block by block.

The format is eight bytes of little-endian header length, a JSON header, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format). Reads use ``pread``, not a memory map, so that only the
requested block is resident, and a file that is truncated while it is open is an error instead of a bus fault. Headers
are read without torch, which takes seconds to import and is not needed to inspect a store or to define an asset.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qwen_pipeline.checkpoint.buffers import empty
from qwen_pipeline.checkpoint.files import parse_json, require_no_pointer, require_regular
from qwen_pipeline.errors import CheckpointRefused

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation."""

_POINTER_BYTES = 64
MAX_AXES = 8

ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of one element of every readable dtype, by its safetensors name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """The dtype and shape of a tensor. ``dtype`` is the safetensors name, such as ``BF16``."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> "torch.dtype":
        from qwen_pipeline.checkpoint.dtypes import TORCH_DTYPES

        return TORCH_DTYPES[self.dtype]

    @property
    def rows(self) -> int:
        """The length of the first axis; a scalar has one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsFile:
    """A file with a valid header. Tensors are in the order of their bytes."""

    path: Path
    specs: Mapping[str, TensorSpec]
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]

    def load(self, name: str, start: int = 0, stop: int | None = None) -> "torch.Tensor":
        """Return rows ``start:stop`` of a tensor (all rows by default), in its stored dtype.

        Raises:
            CheckpointRefused: The file ends before the last byte that its header describes.
        """
        spec = self.specs[name]
        stop = spec.rows if stop is None else stop
        shape = (stop - start, *spec.shape[1:]) if spec.shape else ()
        return self._read(name, start * spec.row_bytes, shape)

    def load_elements(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Return elements ``start:stop`` of a flattened tensor; a block may end within a row.

        Raises:
            CheckpointRefused: The file ends before the last byte that its header describes.
        """
        return self._read(name, start * ITEM_BYTES[self.specs[name].dtype], (stop - start,))

    def _read(self, name: str, offset: int, shape: tuple[int, ...]) -> "torch.Tensor":
        tensor = empty(shape, self.specs[name].torch_dtype)
        with self.path.open("rb", buffering=0) as file:
            _read_into(file.fileno(), as_bytes(tensor), self.offsets[name] + offset, self.path)
        return tensor

    def load_columns(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Return columns ``start:stop`` of a matrix, in its stored dtype; only these are in memory.

        Raises:
            CheckpointRefused: The file ends before the last byte that its header describes.
        """
        import torch

        spec = self.specs[name]
        rows, columns = spec.shape
        nbytes = (stop - start) * ITEM_BYTES[spec.dtype]
        buffer = bytearray(rows * nbytes)
        with self.path.open("rb", buffering=0) as file:
            for row in range(rows):
                offset = self.offsets[name] + (row * columns + start) * ITEM_BYTES[spec.dtype]
                _read_into(file.fileno(), memoryview(buffer)[row * nbytes :][:nbytes], offset, self.path)
        if not buffer:
            return torch.empty((rows, stop - start), dtype=spec.torch_dtype)
        return torch.frombuffer(buffer, dtype=spec.torch_dtype).reshape(rows, stop - start)


def open_safetensors(path: Path) -> SafetensorsFile:
    """Read and verify the header of one file.

    Raises:
        CheckpointRefused: The header is damaged, its offsets and shapes do not agree with the file's size, or the file
            is a pointer of Git LFS.
    """
    require_regular(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        require_no_pointer(file.read(_POINTER_BYTES), path)
        file.seek(0)
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _damaged(path, f"a header of {length:,} bytes does not fit the file's {size:,} bytes")
        try:
            header = parse_json(file.read(length))
        except ValueError as error:
            raise _damaged(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return _checked_file(path, cast("dict[str, Any]", header), data_start=8 + length, size=size)


def as_bytes(tensor: "torch.Tensor") -> memoryview:
    """Return a tensor's bytes; those of a contiguous tensor are not copied."""
    import torch

    flat = tensor.contiguous() if tensor.dim() else tensor.reshape(1)
    return flat.view(torch.uint8).numpy().reshape(-1).data


def read_header(path: Path) -> bytes:
    """Return the length prefix and the header of a valid file."""
    with path.open("rb") as file:
        prefix = file.read(8)
        return prefix + file.read(min(int.from_bytes(prefix, "little"), MAX_HEADER_BYTES))


def header_bytes(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the length prefix and header for tensors in the order of ``specs``, without gaps.

    The header is padded with spaces to a multiple of eight, so that the data is aligned.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + spec.nbytes
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _checked_file(path: Path, header: dict[str, Any], *, data_start: int, size: int) -> SafetensorsFile:
    metadata: object = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _damaged(path, "its __metadata__ is not a JSON object")
    entries = [(*_checked_entry(path, name, entry), name) for name, entry in header.items()]
    entries.sort(key=lambda entry: entry[:2])
    expected = 0
    for begin, end, _, name in entries:
        if begin != expected:
            raise _damaged(path, f"tensor {name!r} starts at byte {begin}, where {expected} was expected")
        expected = end
    if data_start + expected != size:
        raise _damaged(path, f"its header describes {data_start + expected:,} bytes, the file has {size:,}")
    return SafetensorsFile(
        path=path,
        specs={name: spec for _, _, spec, name in entries},
        offsets={name: data_start + begin for begin, _, _, name in entries},
        metadata={str(key): str(value) for key, value in cast("dict[Any, Any]", metadata).items()},
    )


def _checked_entry(path: Path, name: str, entry: Any) -> tuple[int, int, TensorSpec]:
    """Return the offsets of a tensor's first byte and of the one after its last, and its dtype and shape."""
    try:
        spec = TensorSpec(dtype=entry["dtype"], shape=tuple(entry["shape"]))
        begin, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"the entry of tensor {name!r} is incomplete ({error!r})") from error
    if str(spec.dtype) not in ITEM_BYTES:
        raise _damaged(path, f"tensor {name!r} has dtype {spec.dtype!r}; expected one of {', '.join(ITEM_BYTES)}")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (*spec.shape, begin, end)):
        raise _damaged(path, f"tensor {name!r} has a shape or offset that is not a natural number of 64 bits")
    if len(spec.shape) > MAX_AXES:
        raise _damaged(path, f"tensor {name!r} has {len(spec.shape)} axes; at most {MAX_AXES} are supported")
    if end - begin != spec.nbytes:
        raise _damaged(path, f"tensor {name!r} {list(spec.shape)} needs {spec.nbytes} bytes, has {end - begin}")
    return begin, end, spec


def _read_into(fd: int, view: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise _damaged(path, f"it ends at byte {offset + done:,}, before the tensor's last byte")
        done += count


def _damaged(path: Path, why: str) -> CheckpointRefused:
    return CheckpointRefused(
        f"{path} is not a valid safetensors file: {why}.",
        remedy="Download or save the file again, and compare its checksum with that of the source.",
    )
