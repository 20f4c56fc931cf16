"""A derivation has one directory, which is found again, never overwritten and never incomplete."""

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_pipeline.checkpoint.lazy import MANIFEST, open_checkpoint
from qwen_pipeline.checkpoint.manifest import Derivation
from qwen_pipeline.checkpoint.store import derive as module
from qwen_pipeline.checkpoint.store.derive import WORK_DIR, Built, derive
from qwen_pipeline.checkpoint.store.destinations import CheckpointStore, Directory
from qwen_pipeline.checkpoint.store.verify import contents_of_directory, require_intact
from qwen_pipeline.checkpoint.writer import write_checkpoint
from qwen_pipeline.errors import CheckpointRefused, DestinationLocked, DestinationRefused
from qwen_pipeline_tests.checkpoint.copies import copy, flip_bit, note, write_note


def test_the_store_finds_the_output_that_was_requested_last(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.latest("note", "alice") is None

    first = derive(note("one"), store.slot("alice"), write_note)
    second = derive(note("two"), store.slot("alice"), write_note)
    assert first.path != second.path
    assert store.require_latest("note", "alice").path == second.path

    again = derive(note("one"), store.slot("alice"), write_note)
    assert again.reused
    assert store.require_latest("note", "alice").path == first.path
    with pytest.raises(CheckpointRefused, match=r"no note checkpoint of 'bob'.*\n.*qwen-pipeline run bob"):
        store.require_latest("note", "bob")


@pytest.mark.parametrize(
    ("owner", "call", "on"),
    [(module, "write_bytes", MANIFEST), (shutil, "rmtree", WORK_DIR), (Path, "rename", "out.partial")],
)
def test_a_finished_build_is_not_repeated_wherever_the_attempt_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, call: str, on: str
) -> None:
    """The build's resume state stays until the manifest is written; after that, only the rename is repeated."""
    found: list[bool] = []

    def build(partial: Path) -> Built:
        layer = partial / WORK_DIR / "layer"
        found.append(layer.exists())
        layer.parent.mkdir(exist_ok=True)
        layer.touch()
        return write_note(partial)

    original = getattr(owner, call)

    def interrupt(path: Path, *rest: object) -> object:
        if path.name == on:
            raise KeyboardInterrupt
        return original(path, *rest)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(owner, call, interrupt)
        with pytest.raises(KeyboardInterrupt):
            derive(note("one"), Directory(out), build)
    assert not out.exists()
    artifact = derive(note("one"), Directory(out), build)
    assert found == ([False, True] if on == MANIFEST else [False])
    assert {path.name for path in artifact.path.iterdir()} == {"note.txt", "manifest.json"}


@pytest.mark.parametrize("place", ["{file}/out", "/proc/nowhere"])
def test_a_place_where_nothing_can_be_created_is_refused(place: str, tmp_path: Path) -> None:
    (file := tmp_path / "file").write_text("")
    with pytest.raises(DestinationRefused, match="cannot be created"):
        derive(note("one"), Directory(Path(place.format(file=file))), write_note)


def test_a_directory_with_other_files_or_another_output_is_refused(sharded: Path, tmp_path: Path) -> None:
    with pytest.raises(DestinationRefused, match="was not made by this pipeline"):
        copy(sharded, sharded)
    made = derive(note("one"), Directory(tmp_path / "out"), write_note)
    with pytest.raises(DestinationRefused, match=r'another spec: \{"text": "one"\}, expected \{"text": "two"\}'):
        derive(note("two"), Directory(made.path), write_note)


def test_an_empty_directory_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    assert derive(note("one"), Directory(tmp_path / "out"), write_note).path == tmp_path / "out"


def test_two_writers_of_one_output_exclude_each_other(tmp_path: Path) -> None:
    inside, leave = threading.Event(), threading.Event()

    def slow(partial: Path) -> Built:
        inside.set()
        assert leave.wait(10)
        return write_note(partial)

    writer = threading.Thread(target=derive, args=(note("one"), Directory(tmp_path / "out"), slow))
    writer.start()
    assert inside.wait(10)
    with pytest.raises(DestinationLocked, match="Another process is writing"):
        derive(note("one"), Directory(tmp_path / "out"), write_note)
    leave.set()
    writer.join()
    assert derive(note("one"), Directory(tmp_path / "out"), write_note).reused


def test_the_partial_files_of_another_derivation_are_removed(sharded: Path, tmp_path: Path) -> None:
    stale = tmp_path / "out.partial"
    stale.mkdir()
    (stale / "stale.safetensors").write_bytes(b"stale")
    (stale / ".derivation").write_text("another key")

    assert "stale.safetensors" not in copy(sharded, tmp_path / "out").manifest.contents.files


def test_any_flipped_bit_is_found(sharded: Path, tmp_path: Path) -> None:
    made = copy(sharded, tmp_path / "out")
    for file in sorted(made.path.iterdir()):
        flip_bit(file, offset=0)
        with pytest.raises(CheckpointRefused, match=file.name):
            require_intact(made.path)
        flip_bit(file, offset=0)
    require_intact(made.path)


def test_a_truncated_or_missing_file_is_found_without_reading_bytes(sharded: Path, tmp_path: Path) -> None:
    made = copy(sharded, tmp_path / "out")
    (made.path / "model-00001-of-00002.safetensors").write_bytes(b"")

    with pytest.raises(CheckpointRefused, match=r"model-00001-of-00002\.safetensors is missing or does not have the"):
        copy(sharded, tmp_path / "out")


def test_the_key_depends_on_every_field() -> None:
    derivation = Derivation(stage="a", inputs={"x": "1"}, spec={"y": 1}, code_version="1")
    changed = [
        replace(derivation, stage="b"),
        replace(derivation, inputs={"x": "2"}),
        replace(derivation, spec={"y": 2}),
        replace(derivation, code_version="2"),
    ]

    assert len({each.key for each in (derivation, *changed)}) == 1 + len(changed)


def test_a_copy_of_a_checkpoint_has_its_digest(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    contents = write_checkpoint(open_checkpoint(sharded), tmp_path / "copy", task="")

    assert contents.digest == contents_of_directory(tmp_path / "copy").digest
