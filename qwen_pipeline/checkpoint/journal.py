"""What an interrupted attempt has finished, tensor by tensor, and whether its bytes are still what was written down.

Lines are appended without a sync: after a power cut a line may be missing or the bytes behind it, and both are found
when the bytes are hashed again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from pydantic import TypeAdapter

from qwen_pipeline.checkpoint.digest import Seen, SeenTensor, read_tensors
from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor, StoredTensor
from qwen_pipeline.checkpoint.safetensors_file import open_safetensors
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.progress import Observe

JOURNAL = ".journal.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedTensor:
    """One line of the journal.

    Attributes:
        written: What was written.
        passed: Name of a tap -> what it saw of the tensor of the same name.
    """

    name: str
    written: SeenTensor
    passed: Mapping[str, SeenTensor]


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
        """Return the last line of each tensor; a torn last line is ignored."""
        if not self._path.is_file():
            return {}
        lines = self._path.read_bytes().splitlines(keepends=True)
        return {(tensor := _LINE.validate_json(line)).name: tensor for line in lines if line.endswith(b"\n")}


def still_there(files: Mapping[Path, Sequence[FinishedTensor]], *, task: str, observe: Observe) -> set[str]:
    """Return the tensors, by name, that each file still holds with the digest that the journal has for them."""
    tensors: dict[str, LazyTensor] = {}
    expected: dict[str, FinishedTensor] = {}
    for path, finished in files.items():
        try:
            file = open_safetensors(path)
        except (CheckpointRefused, OSError):
            continue
        expected |= {tensor.name: tensor for tensor in finished if tensor.name in file.specs}
        tensors |= {name: _stored(StoredTensor(file, name)) for name in file.specs if name in expected}
    found = _read(tensors, task=task, observe=observe)
    return {name for name, seen in found.items() if seen.digest == expected[name].written.digest}


def _stored(stored: StoredTensor) -> LazyTensor:
    return LazyTensor(
        spec=stored.file.specs[stored.name],
        read=lambda start, stop: stored.file.load(stored.name, start, stop),
        stored=stored,
    )


def _read(tensors: Mapping[str, LazyTensor], *, task: str, observe: Observe) -> Seen:
    held = Checkpoint(config={}, tensors=tensors, shards={})
    return read_tensors(held, held, task=task, observe=observe) if tensors else {}
