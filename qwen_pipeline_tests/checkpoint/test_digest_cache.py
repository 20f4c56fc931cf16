"""Digests are cached until a file changes, under keys and in a form that later versions can read."""

import hashlib
import json
from pathlib import Path

import pytest

from qwen_pipeline.checkpoint.digest import hash_checkpoint, hash_tensors
from qwen_pipeline.checkpoint.digest_cache import DigestCache, checkpoint_digest, directory_digest, fingerprint
from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.errors import EnvironmentFault
from qwen_pipeline_tests.checkpoint.copies import copy


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qwen-pipeline" / "digests-4"


def key_of(*files: Path) -> str:
    stats = [(str(file.resolve()), file.stat()) for file in sorted(files)]
    values = [[path, stat.st_size, stat.st_ino, stat.st_mtime_ns] for path, stat in stats]
    return hashlib.sha256(json.dumps(values, separators=(",", ":")).encode()).hexdigest()


def test_digests_of_foreign_directories_are_cached_until_a_file_changes(
    cache: Path, sharded: Path, tmp_path: Path
) -> None:
    first = checkpoint_digest(sharded)
    assert first == copy(sharded, tmp_path / "out").manifest.content_digest
    assert checkpoint_digest(sharded) == first
    assert len([path for path in cache.rglob("*") if path.is_file()]) == 1

    (sharded / "config.json").write_text('{"model_type": "qwen3"}')
    assert checkpoint_digest(sharded) != first


def test_without_a_home_directory_the_error_names_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 9)  # no entry in the table of users
    with pytest.raises(EnvironmentFault, match="no home directory") as fault:
        DigestCache()
    assert "XDG_CACHE_HOME" in str(fault.value.remedy)


def test_an_entry_is_named_by_the_stats_of_its_files_and_holds_every_digest(cache: Path, sharded: Path) -> None:
    contents = hash_checkpoint(open_checkpoint(sharded), sharded)
    assert checkpoint_digest(sharded) == contents.digest

    names = ("config.json", "tokenizer.json", *(f"model-0000{number}-of-00002.safetensors" for number in (1, 2)))
    entry = cache / key_of(*(sharded / name for name in names))
    assert fingerprint(sharded) == f"files:{entry.name}"
    assert json.loads(entry.read_bytes()) == {
        "tensors": {
            name: {
                "digest": {"dtype": tensor.dtype, "shape": list(tensor.shape), "tree_blake3": tensor.tree_blake3},
                "finite": True,
            }
            for name, tensor in contents.tensors.items()
        },
        "files": {
            name: {
                "bytes": (sharded / name).stat().st_size,
                "sha256": hashlib.sha256((sharded / name).read_bytes()).hexdigest(),
            }
            for name in ("config.json", "tokenizer.json")
        },
    }


def test_a_checkpoint_is_found_after_it_was_added_or_by_its_manifest(
    cache: Path, sharded: Path, tmp_path: Path
) -> None:
    source = open_checkpoint(sharded)
    assert DigestCache().find(sharded) is None
    added = DigestCache().add(sharded, source, hash_tensors(source.tensors, task=""))
    assert DigestCache().find(sharded) == added

    made = copy(sharded, tmp_path / "out")
    by_manifest = DigestCache().find(made.path)
    assert by_manifest
    assert by_manifest.digest == added.digest == fingerprint(made.path) == checkpoint_digest(made.path)
    assert {tensor.finite for tensor in by_manifest.tensors.values()} == {None}
    assert len(list(cache.iterdir())) == 1


def test_the_digest_of_single_files_is_cached_by_file(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_bytes(b"hello")
    first = directory_digest({"records": file})
    entry = cache / key_of(file)
    assert entry.read_text() == hashlib.sha256(b"hello").hexdigest()
    assert first == "sha256:" + hashlib.sha256(f'{{"records":"{entry.read_text()}"}}'.encode()).hexdigest()
    file.write_bytes(b"hello again")
    assert directory_digest({"records": file}) != first
