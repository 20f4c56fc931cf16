"""Hostile files are refused by name, at once, and without the memory that they ask for."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline.checkpoint.files import MAX_JSON_BYTES, load_json
from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.safetensors_file import MAX_AXES, open_safetensors
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.models.inbox import Arrival

DEEP = b"[" * 100_000 + b"]" * 100_000
GOOD: dict[str, Any] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(40_000_000_000)


def replaced_by_directory(path: Path) -> None:
    path.mkdir()


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def looping(path: Path) -> None:
    path.symlink_to(path)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def holding(data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "is not a regular file"),
        (endless, "is not a regular file"),
        (replaced_by_directory, "is not a regular file"),
        (looping, "cannot be read"),
        (dangling, "is missing"),
        (sparse, f"has 40,000,000,000 bytes, but such a file here has at most {MAX_JSON_BYTES:,}"),
        (holding(b'{"a": ' + DEEP + b"}"), "is not valid JSON: it is nested too deeply"),
        (holding(b'{"a": 1, "b": 2, "a": 3}'), "is not valid JSON: repeated keys 'a'"),
        (holding(b'{"a": ' + b"9" * 5000 + b"}"), "is not valid JSON"),
        (holding('{"a": 1}'.encode("utf-16")[:-1]), "is not valid JSON"),
        (holding(b"[]"), "is not a JSON object"),
    ],
)
def test_a_json_file_that_is_none_is_refused(tmp_path: Path, make: Callable[[Path], None], words: str) -> None:
    make(tmp_path / "config.json")
    with pytest.raises(CheckpointRefused) as refusal:
        load_json(tmp_path / "config.json")
    assert words in refusal.value.what
    assert str(tmp_path / "config.json") in refusal.value.what


def test_a_sidecar_that_is_far_too_large_is_refused(sharded: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(sharded, root)
    sparse(root / "LICENSE.txt")
    with pytest.raises(
        CheckpointRefused, match=r"LICENSE\.txt has 40,000,000,000 bytes, but a file beside the weights"
    ):
        open_checkpoint(root)


def header(entries: object) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (header(DEEP), "its header is not valid JSON (it is nested too deeply)"),
        (header(b'{"a": {}, "a": {}}'), "its header is not valid JSON (repeated keys 'a')"),
        (header({"__metadata__": None, "a": GOOD}) + bytes(4), "its __metadata__ is not a JSON object"),
        (header({"__metadata__": [1], "a": GOOD}) + bytes(4), "its __metadata__ is not a JSON object"),
        (header({"a": None}), "the entry of tensor 'a' is incomplete"),
        (header({"a": {**GOOD, "dtype": ["F32"]}}) + bytes(4), "tensor 'a' has dtype ['F32']"),
        (header({"a": {**GOOD, "dtype": None}}) + bytes(4), "tensor 'a' has dtype None"),
        (header({"a": {**GOOD, "shape": [True]}}) + bytes(4), "not a natural number of 64 bits"),
        (header({"a": {**GOOD, "shape": [10**4000]}}) + bytes(4), "not a natural number of 64 bits"),
        (header({"a": {**GOOD, "shape": [1] * 60_000}}) + bytes(4), f"at most {MAX_AXES} are supported"),
        (header({"a": {**GOOD, "data_offsets": [0, 4, 8]}}) + bytes(4), "is incomplete"),
        ((2**63).to_bytes(8, "little"), "does not fit the file's 8 bytes"),
        (b"", "does not fit the file's 0 bytes"),
    ],
)
def test_a_hostile_header_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointRefused) as refusal:
        open_safetensors(path)
    assert words in refusal.value.what


@pytest.mark.parametrize("file", ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("make", [os.mkfifo, dangling, looping])
def test_a_directory_with_an_entry_that_is_no_file_is_refused(
    sharded: Path, tmp_path: Path, file: str, make: Callable[[Path], None]
) -> None:
    """Neither the checkpoint nor the inbox waits for the writer of a FIFO, or passes over it in silence."""
    root = tmp_path / "copy"
    shutil.copytree(sharded, root)
    (root / file).unlink(missing_ok=True)
    make(root / file)
    with pytest.raises(CheckpointRefused):
        open_checkpoint(root)
    assert Arrival("copy", root).obstacle() == f"{file} is neither a regular file nor a directory"
