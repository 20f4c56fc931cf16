"""Pickles as data: nothing that a pickle names is imported, and every name outside of a short list is refused.

A pickle is a program: it names functions and classes, and the unpickler calls them. Here each permitted name stands for
an inert object of this module or a container of Python; :meth:`pickle.Unpickler.find_class` is the only way from a name
to an object (https://docs.python.org/3/library/pickle.html#restricting-globals). The stand-ins cannot be changed by the
pickle, so that one file cannot affect how the next one is read.
"""

import io
import pickle
import pickletools
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from qwen_pipeline.errors import CheckpointRefused, PipelineError

MALFORMED = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    TypeError, ValueError, struct.error, zlib.error,
)  # fmt: skip
"""The errors of reading values that do not have the form that their file claims."""
_NO_DTENSORS = "Merge the ranks' files with the trainer's own tool (verl: python -m verl.model_merger merge), which"
_REMEDIES: Mapping[str, str] = {
    "torch.distributed.tensor": f"{_NO_DTENSORS} writes safetensors.",
    "torch.distributed._tensor": f"{_NO_DTENSORS} writes safetensors.",
}
_REMEDY = "Do not load it elsewhere unless you trust its author. Ask for the weights as safetensors, or for a file that"
_KEEPING = ("PUT", "BINPUT", "LONG_BINPUT")
_RECORDS = ("deepspeed.", "torch.distributed.checkpoint.")
"""Packages whose classes are read as :class:`Record`."""


class _Sealed(type):
    """The metaclass of classes whose attributes cannot be set."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise pickle.UnpicklingError(f"it sets {name} of a class")


class Record(metaclass=_Sealed):
    """An inert object in place of an instance of some class.

    Attributes:
        args: The arguments that it would have been made from.
        state: The state that it would have got; by default the instance's attributes, by name.
    """

    __slots__ = ("args", "state")
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> "Record":
        record = object.__new__(cls)
        object.__setattr__(record, "args", args)
        object.__setattr__(record, "state", {})
        return record

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise pickle.UnpicklingError(f"it sets {name} of an object")

    def __setstate__(self, state: Any) -> None:
        object.__setattr__(self, "state", state)

    def __getitem__(self, attribute: str) -> Any:
        """Return an attribute of the original object.

        Raises:
            KeyError: It has none of that name.
        """
        if not isinstance(self.state, dict):
            raise KeyError(attribute)
        return self.state[attribute]


class Function(metaclass=_Sealed):
    """A function of this package in place of one that a pickle names."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise pickle.UnpicklingError(f"it sets {name} of a function")


def record_class(name: str) -> type[Record]:
    """Return a class for instances of the class ``name``."""
    return _Sealed(name, (Record,), {"__slots__": ()})


_PERMITTED: Mapping[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": Function(lambda *_: {}),
    "builtins.dict": dict,
    "builtins.list": list,
    "builtins.tuple": tuple,
    "builtins.set": set,
    "builtins.int": record_class("int"),
    "builtins.long": record_class("int"),
    "argparse.Namespace": record_class("argparse.Namespace"),
    "pathlib.PosixPath": record_class("pathlib.PosixPath"),
    "pathlib._local.PosixPath": record_class("pathlib.PosixPath"),
    "numpy.dtype": record_class("numpy.dtype"),
    "numpy.core.multiarray.scalar": record_class("numpy.scalar"),
    "numpy._core.multiarray.scalar": record_class("numpy.scalar"),
    "numpy.ndarray": record_class("numpy.ndarray"),
    "numpy.core.multiarray._reconstruct": record_class("numpy.ndarray"),
    "numpy._core.multiarray._reconstruct": record_class("numpy.ndarray"),
    "_codecs.encode": record_class("bytes"),
}


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, data: bytes, source: str, permitted: Mapping[str, Any], persistent: Callable[[Any], Any] | None
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._source, self._permitted, self._persistent = source, permitted, persistent

    def find_class(self, module: str, name: str, /) -> Any:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full in self._permitted:
            return self._permitted[full]
        if full.startswith(_RECORDS):
            return record_class(full)
        remedy = next((text for prefix, text in _REMEDIES.items() if full.startswith(prefix)), None)
        raise CheckpointRefused(
            f"{self._source} names {full}, which no plain state dict does: a pickle can run what it names. Nothing was"
            " run.",
            remedy=remedy or f"{_REMEDY} holds only tensors in dicts.",
        )

    def persistent_load(self, pid: Any, /) -> Any:
        if self._persistent is None:
            raise pickle.UnpicklingError("it has a persistent id")
        return self._persistent(pid)


def load_pickle(
    data: bytes,
    *,
    source: Path | str,
    permitted: Mapping[str, Any] | None = None,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Return the value of a pickle, with a :class:`Record` for each object that is not a container or a number.

    Args:
        data: The pickle.
        source: The file, for messages.
        permitted: Full name -> stand-in, in addition to Python's containers.
        persistent: Returns the object of a persistent id.

    Raises:
        CheckpointRefused: The pickle names anything else; the message says what. Or it is damaged.
    """
    unpickler = _Unpickler(data, str(source), {**_PERMITTED, **(permitted or {})}, persistent)
    try:
        _require_small_memo(data)
        return unpickler.load()
    except PipelineError:
        raise
    except Exception as error:
        raise damaged(source, str(error) or type(error).__name__) from error


def _require_small_memo(data: bytes) -> None:
    """Require that no value is kept under a larger number than there are bytes.

    Python's unpickler takes memory for all numbers up to the largest one: 16 GiB for a few bytes of a damaged file.

    Raises:
        ValueError: One is larger, or the pickle is malformed.
    """
    for opcode, number, _ in pickletools.genops(data):
        if opcode.name in _KEEPING and not 0 <= int(number or 0) <= len(data):
            raise ValueError(f"it keeps a value under the number {number}")


def damaged(source: Path | str, why: str) -> CheckpointRefused:
    return CheckpointRefused(
        f"{source} is not a valid checkpoint file: {why}.",
        remedy="Fetch or save it again: the upload is incomplete, or the training was stopped while it was saving.",
    )
