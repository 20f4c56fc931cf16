"""Copies of a checkpoint by the pipeline's own writer, and the digest of the format in its plainest form."""

from pathlib import Path

from blake3 import blake3

from qwen_pipeline.checkpoint.files import write_bytes
from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.manifest import Derivation
from qwen_pipeline.checkpoint.store.derive import Built, derive
from qwen_pipeline.checkpoint.store.destinations import Artifact, Directory
from qwen_pipeline.checkpoint.store.verify import contents_of_directory
from qwen_pipeline.checkpoint.writer import write_checkpoint

COPY = Derivation(stage="copy", inputs={}, spec={}, code_version="1")


def copy(source: Path, out: Path) -> Artifact:
    """Derive a copy of a checkpoint."""

    def build(partial: Path) -> Built:
        return Built(contents=write_checkpoint(open_checkpoint(source), partial, task="copy"))

    return derive(COPY, Directory(out), build)


def note(text: str) -> Derivation:
    """Return the derivation of a directory with one file."""
    return Derivation(stage="note", inputs={}, spec={"text": text}, code_version="1")


def write_note(partial: Path) -> Built:
    """Build the directory of a note."""
    write_bytes(partial / "note.txt", b"hello")
    return Built(contents=contents_of_directory(partial))


def flip_bit(path: Path, *, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def tree_digest(data: bytes, leaf: int = 2**20) -> str:
    """Return the tensor digest of docs/format.md, from all bytes at once."""
    leaves = [data[start : start + leaf] for start in range(0, len(data), leaf)]
    return blake3(b"".join(blake3(each).digest() for each in leaves)).hexdigest()
