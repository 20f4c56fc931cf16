"""docs/format.md is tested by a golden file, and by a reader that implements the document alone."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline.checkpoint.lazy import MANIFEST
from qwen_pipeline.checkpoint.manifest import (
    Contents,
    Derivation,
    FileDigest,
    Manifest,
    RunFigures,
    ShardDigest,
    TensorDigest,
    dump_manifest,
    open_manifest,
)
from qwen_pipeline.checkpoint.store.derive import derive
from qwen_pipeline.checkpoint.store.destinations import CheckpointStore
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline_tests.checkpoint.copies import copy, note, tree_digest, write_note

GOLDEN = Path(__file__).with_name("golden_manifest.json")


def test_a_manifest_is_written_and_read_byte_for_byte(tmp_path: Path) -> None:
    contents = Contents(
        tensors={"w": TensorDigest(dtype="BF16", shape=(2, 3), tree_blake3=tree_digest(bytes(12)))},
        files={
            "config.json": FileDigest(bytes=2, sha256=hashlib.sha256(b"{}").hexdigest()),
            "model.safetensors": ShardDigest(bytes=92, header_sha256="0" * 64),
        },
    )
    manifest = Manifest(
        derivation=Derivation(stage="merged", inputs={"base": "sha256:0"}, spec={"base_names": []}, code_version="3"),
        contents=contents,
        content_digest="sha256:3dba72af60b29c4bbc150f9d8079bf59acaaf9d95c71c115ec3ca1aa66fa3841",
        result={"kind": "adapter"},
        run=RunFigures(
            seconds=1.5,
            peak_memory_bytes=2,
            added_memory_bytes=1,
            read_bytes=4,
            written_bytes=3,
            started="2026-01-01T00:00:00+00:00",
            environment={"python": "3.12"},
        ),
    )
    assert dump_manifest(manifest) == GOLDEN.read_bytes()
    (tmp_path / MANIFEST).write_bytes(GOLDEN.read_bytes())
    assert open_manifest(tmp_path) == manifest


def content_digest(root: Path) -> str:
    """Return a finished directory's content digest by docs/format.md."""
    beside = {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
        and path.suffix != ".safetensors"
        and path.name not in ("manifest.json", "model.safetensors.index.json")
        and path.relative_to(root).parts[0] != "logs"
    }
    tensors: dict[str, Any] = {}
    for path in root.glob("*.safetensors"):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                tensors[name] = [entry["dtype"], entry["shape"], tree_digest(data[start + begin : start + end])]
    canonical = json.dumps(
        {"tensors": tensors, "files": beside}, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def test_an_independent_reader_finds_the_same_content_digest(sharded: Path, tmp_path: Path) -> None:
    made = copy(sharded, tmp_path / "out")
    assert content_digest(made.path) == made.manifest.content_digest


@pytest.mark.parametrize("version", [1, 2, 3])
def test_an_older_format_is_refused_by_name_and_counts_as_absent(tmp_path: Path, version: int) -> None:
    store = CheckpointStore(tmp_path)
    made = derive(note("one"), store.slot("alice"), write_note)
    path = made.path / MANIFEST
    path.write_text(path.read_text().replace("qwen-pipeline/manifest/4", f"qwen-pipeline/manifest/{version}"))

    with pytest.raises(CheckpointRefused, match=rf"has the format 'qwen-pipeline/manifest/{version}'.*\n.*stage again"):
        open_manifest(made.path)
    assert store.latest("note", "alice") is None
    assert store.finished("note", "alice") == []


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"format": []}'])
def test_what_is_not_a_manifest_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(data)
    with pytest.raises(CheckpointRefused, match=r"manifest\.json is damaged: format "):
        open_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../config.json", "/etc/hostname", "a/../../b", ""])
def test_a_manifest_names_only_files_below_its_directory(tmp_path: Path, name: str) -> None:
    value = json.loads(GOLDEN.read_bytes())
    value["contents"]["files"][name] = value["contents"]["files"]["config.json"]
    (tmp_path / MANIFEST).write_text(json.dumps(value))
    with pytest.raises(CheckpointRefused, match="which is not a path below its directory"):
        open_manifest(tmp_path)


def test_a_spec_without_canonical_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(GOLDEN.read_bytes().replace(b'"base_names": []', b'"base_names": NaN'))
    with pytest.raises(CheckpointRefused, match="a value without canonical JSON"):
        open_manifest(tmp_path)
