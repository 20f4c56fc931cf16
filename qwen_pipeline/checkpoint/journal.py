"""The journal of a directory that is being written: a line for each tensor that an attempt finished.

Lines are appended without a sync. After a power cut a line may be missing, or the bytes that it describes: the next
attempt hashes the bytes again and so detects either.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from pydantic import TypeAdapter

from qwen_pipeline.checkpoint.digest import HashedTensor, hash_tensors
from qwen_pipeline.checkpoint.lazy import LazyTensor, stored_tensor
from qwen_pipeline.checkpoint.safetensors_file import open_safetensors
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.progress import Observe

JOURNAL = ".journal.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedTensor:
    """One line of the journal.

    Attributes:
        written: The hash result of the tensor as it was written.
        passed: Name of a :class:`HashingReader` -> its hash result for the input tensor of the same name.
    """

    name: str
    written: HashedTensor
    passed: Mapping[str, HashedTensor]


_LINE = TypeAdapter(FinishedTensor)


class Journal:
    """The journal of one directory."""

    def __init__(self, root: Path) -> None:
        self._path = root / JOURNAL
        self._lock = Lock()

    def append(self, tensor: FinishedTensor) -> None:
        with self._lock, self._path.open("ab") as file:
            file.write(_LINE.dump_json(tensor) + b"\n")

    def read(self) -> dict[str, FinishedTensor]:
        """Return the last line of each tensor; an incomplete last line is ignored."""
        if not self._path.is_file():
            return {}
        lines = self._path.read_bytes().splitlines(keepends=True)
        return {(tensor := _LINE.validate_json(line)).name: tensor for line in lines if line.endswith(b"\n")}


def verify_finished(files: Mapping[Path, Sequence[FinishedTensor]], *, task: str, observe: Observe) -> set[str]:
    """Hash the finished tensors of files again; return the names of those that still have the journal's digest."""
    tensors: dict[str, LazyTensor] = {}
    expected: dict[str, FinishedTensor] = {}
    for path, finished in files.items():
        try:
            file = open_safetensors(path)
        except (CheckpointRefused, OSError):
            continue
        expected |= {tensor.name: tensor for tensor in finished if tensor.name in file.specs}
        tensors |= {name: stored_tensor(file, name) for name in file.specs if name in expected}
    found = hash_tensors(tensors, task=task, observe=observe) if tensors else {}
    return {name for name, hashed in found.items() if hashed.digest == expected[name].written.digest}
