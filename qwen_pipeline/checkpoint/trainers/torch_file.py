"""Files of ``torch.save``: their values are read without torch's unpickler, and their tensors' bytes by ``pread``.

Such a file is a ZIP archive without compression: ``<name>/data.pkl`` is a pickle of the saved value, in which each
storage is a persistent id, and ``<name>/data/<key>`` are the bytes of a storage
(https://docs.pytorch.org/docs/stable/notes/serialization.html#torch-save). A file may be a part of a larger one.
"""

import io
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_pipeline.checkpoint.buffers import empty
from qwen_pipeline.checkpoint.lazy import LazyTensor
from qwen_pipeline.checkpoint.safetensors_file import ITEM_BYTES, TensorSpec, as_bytes
from qwen_pipeline.checkpoint.trainers.unpickler import MALFORMED, Function, Record, damaged, load_pickle, record_class
from qwen_pipeline.errors import CheckpointRefused

if TYPE_CHECKING:
    import torch

_MAX_PICKLE_BYTES = 2**28
_DTYPES: Mapping[str, tuple[str, ...]] = {
    "BOOL": ("bool", "BoolStorage"),
    "U8": ("uint8", "ByteStorage"),
    "I8": ("int8", "CharStorage"),
    "I16": ("int16", "ShortStorage"),
    "U16": ("uint16",),
    "I32": ("int32", "IntStorage"),
    "U32": ("uint32",),
    "I64": ("int64", "LongStorage"),
    "U64": ("uint64",),
    "F8_E4M3": ("float8_e4m3fn",),
    "F8_E5M2": ("float8_e5m2",),
    "F16": ("float16", "HalfStorage"),
    "BF16": ("bfloat16", "BFloat16Storage"),
    "F32": ("float32", "FloatStorage"),
    "F64": ("float64", "DoubleStorage"),
}
"""safetensors' name of a dtype -> torch's name, and that of the class of its storages."""


@dataclass(frozen=True, slots=True)
class Dtype:
    """A dtype, or a class of storages of this dtype, by its safetensors name; None for storages of bytes."""

    name: str | None


@dataclass(frozen=True, slots=True)
class Storage:
    """Consecutive bytes of a file, which several tensors may share."""

    path: Path
    offset: int
    nbytes: int
    dtype: str | None

    def read_into(self, view: memoryview, start: int) -> None:
        """Read the bytes from ``start`` on.

        Raises:
            CheckpointRefused: The file ends before the last one.
        """
        done = 0
        with self.path.open("rb", buffering=0) as file:
            while done < len(view):
                count = os.preadv(file.fileno(), [view[done:]], self.offset + start + done)
                if count == 0:
                    raise damaged(self.path, f"it ends at byte {self.offset + start + done:,}, within a tensor")
                done += count


@dataclass(frozen=True, slots=True)
class StoredView:
    """A tensor of a file, as a view of a storage; ``offset`` and ``stride`` count elements."""

    storage: Storage
    offset: int
    spec: TensorSpec
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for length, stride in zip(reversed(self.spec.shape), reversed(self.stride), strict=True):
            if length != 1 and stride != expected:
                return False
            expected *= length
        return True

    def load(self, start: int, stop: int) -> "torch.Tensor":
        """Return rows ``start:stop``; of a view that is not contiguous, all elements in between are read too."""
        shape = (stop - start, *self.spec.shape[1:]) if self.spec.shape else ()
        if self.is_contiguous:
            row = prod(self.spec.shape[1:])
            return self.load_elements(start * row, start * row + prod(shape)).reshape(shape)
        steps = [(length - 1) * stride for length, stride in zip(shape, self.stride, strict=True)]
        block = self._read(self.offset + start * self.stride[0], sum(steps) + 1 if prod(shape) else 0)
        return block.as_strided(shape, self.stride).contiguous() if prod(shape) else block.reshape(shape)

    def load_elements(self, start: int, stop: int) -> "torch.Tensor":
        """Return elements ``start:stop`` of a contiguous view, flattened."""
        return self._read(self.offset + start, stop - start)

    def _read(self, start: int, count: int) -> "torch.Tensor":
        tensor = empty((count,), self.spec.torch_dtype)
        if count:
            self.storage.read_into(as_bytes(tensor), start * ITEM_BYTES[self.spec.dtype])
        return tensor

    def lazy(self) -> LazyTensor:
        return LazyTensor(spec=self.spec, read=self.load)


def open_torch_file(path: Path, *, start: int = 0, length: int | None = None) -> Any:
    """Return the value that ``torch.save`` wrote, with a :class:`StoredView` for each tensor.

    Args:
        path: The file.
        start: Its first byte, if it is a part of a larger file.
        length: Its number of bytes; by default all.

    Raises:
        CheckpointRefused: The file names something that is not part of a state dict, is damaged, is in the format of
            torch before 1.6, or has a tensor of an unknown kind.
    """
    length = path.stat().st_size - start if length is None else length
    try:
        with _Part(path, start, length) as file, zipfile.ZipFile(file) as archive:
            return _Archive(path, start, file, archive).load()
    except zipfile.BadZipFile as error:
        raise _not_an_archive(path, str(error)) from error
    except MALFORMED as error:
        raise damaged(path, repr(error)) from error


@dataclass(slots=True)
class _Archive:
    path: Path
    start: int
    file: "_Part"
    archive: zipfile.ZipFile
    storages: dict[str, Storage] = field(default_factory=dict[str, Storage])

    def load(self) -> Any:
        entries = [name for name in self.archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(entries) != 1:
            raise damaged(self.path, "it is an archive without data.pkl, so torch.save did not write it")
        root = entries[0].removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in self.archive.namelist() and self._content(order, 16) != b"little":
            raise damaged(self.path, "its numbers are big-endian")
        return load_pickle(
            self._content(entries[0], _MAX_PICKLE_BYTES),
            source=self.path,
            permitted=_PERMITTED,
            persistent=lambda pid: self._storage(root, pid),
        )

    def _content(self, name: str, most: int) -> bytes:
        info = self.archive.getinfo(name)
        if info.file_size > most:
            raise damaged(self.path, f"{name} has {info.file_size:,} bytes, more than {most:,}")
        return self.archive.read(name)

    def _storage(self, root: str, pid: Any) -> Storage:
        """Return the storage of a persistent id: ``("storage", class, key, location, number of elements)``."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, Dtype):
            raise ValueError(f"unknown persistent id {pid!r}")
        if key not in self.storages:
            info = self.archive.getinfo(f"{root}data/{key}")
            nbytes = count * (ITEM_BYTES[dtype.name] if dtype.name else 1)
            if info.compress_type != zipfile.ZIP_STORED or info.file_size < nbytes:
                raise ValueError(f"storage {key} has {info.file_size} bytes, expected {nbytes}")
            self.storages[key] = Storage(self.path, self._data_start(info), nbytes, dtype.name)
        return self.storages[key]

    def _data_start(self, info: zipfile.ZipInfo) -> int:
        """Return the position of an entry's bytes: they follow its local header of 30 bytes, its name and its extra."""
        self.file.seek(info.header_offset + 26)
        lengths = self.file.read(4)
        name, extra = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
        return self.start + info.header_offset + 30 + name + extra


class _Part(io.RawIOBase):
    """A range of bytes of a file, as a file."""

    def __init__(self, path: Path, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = path.open("rb", buffering=0), start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        count = os.preadv(self._file.fileno(), [view], self._start + self._at) if len(view) else 0
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _tensor(storage: Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> StoredView:
    """Stand for ``torch._utils._rebuild_tensor_v2``: requires_grad and hooks follow, and views as a negative or so."""
    if len(rest) > 2 and rest[2]:
        raise ValueError(f"a tensor is a view of the kind {rest[2]}")
    return _view(storage, storage.dtype, offset, shape, stride)


def _tensor_of(storage: Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> StoredView:
    """Stand for ``torch._utils._rebuild_tensor_v3``, where a dtype follows requires_grad and hooks."""
    return _view(storage, rest[2].name, offset, shape, stride)


def _view(storage: Storage, dtype: str | None, offset: int, shape: Any, stride: Any) -> StoredView:
    if dtype is None or len(shape) != len(stride):
        raise ValueError(f"a tensor of shape {shape} has dtype {dtype} and strides {stride}")
    if not all(isinstance(number, int) and number >= 0 for number in (offset, *shape, *stride)):
        raise ValueError(f"a tensor has offset {offset}, shape {shape} and strides {stride}")
    last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
    if prod(shape) and (last + 1) * ITEM_BYTES[dtype] > storage.nbytes:
        raise ValueError(f"a tensor of shape {shape} does not fit its storage of {storage.nbytes} bytes")
    return StoredView(storage, offset, TensorSpec(dtype=dtype, shape=tuple(shape)), tuple(stride))


def _subclass(rebuild: Any, _kind: Any, args: Any, _state: Any) -> Any:
    """Stand for ``torch._tensor._rebuild_from_type_v2``: a parameter, or a tensor with attributes."""
    if not isinstance(rebuild, Function):
        raise TypeError(f"a tensor is rebuilt by {rebuild!r}")
    return rebuild(*args)


_PERMITTED: Mapping[str, Any] = {
    **{f"torch.{torch_name}": Dtype(name) for name, names in _DTYPES.items() for torch_name in names},
    "torch.storage.UntypedStorage": Dtype(None),
    "torch.UntypedStorage": Dtype(None),
    "torch.Size": tuple,
    "torch.device": record_class("torch.device"),
    "torch.serialization._get_layout": record_class("torch.layout"),
    "torch.Tensor": record_class("torch.Tensor"),
    "torch.nn.parameter.Parameter": record_class("torch.nn.parameter.Parameter"),
    "torch._utils._rebuild_tensor_v2": Function(_tensor),
    "torch._utils._rebuild_tensor_v3": Function(_tensor_of),
    "torch._utils._rebuild_parameter": Function(lambda data, *_: data),
    "torch._utils._rebuild_parameter_with_state": Function(lambda data, *_: data),
    "torch._tensor._rebuild_from_type_v2": Function(_subclass),
}


def torch_names() -> Mapping[str, Any]:
    """Return the stand-ins for torch's own names in a pickle."""
    return _PERMITTED


def kind_of(value: Any) -> str:
    """Return the kind of a value that is not a tensor, for a message."""
    return type(value).__name__ if not isinstance(value, Record) else type(value).__qualname__


def _not_an_archive(path: Path, why: str) -> CheckpointRefused:
    return CheckpointRefused(
        f"{path} is not a file that torch.save writes since version 1.6 ({why}).",
        remedy="If it is older, save it again: python -c \"import torch; torch.save(torch.load('OLD', weights_only=True"
        "), 'NEW')\". If not, fetch it again: it is incomplete.",
    )
