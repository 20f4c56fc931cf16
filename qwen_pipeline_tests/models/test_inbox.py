"""An upload is complete or has an obstacle, and unsafe names are refused."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen_pipeline.errors import DestinationRefused, InputRefused
from qwen_pipeline.models.inbox import MARKER, Arrival, Inbox, require_name


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    root = tmp_path / "inbox" / "poet"
    root.mkdir(parents=True)
    (root / "adapter_config.json").write_text("{}")
    save_file({"a": torch.ones(64)}, root / "adapter_model.safetensors")
    return root


def arrival(upload: Path) -> Arrival:
    """Return the upload as a new object, without cached properties."""
    return Arrival(upload.name, upload)


def test_a_complete_upload_has_no_obstacle(upload: Path) -> None:
    assert arrival(upload).obstacle() is None
    assert Inbox(upload.parent).require("poet").path == upload


@pytest.mark.parametrize("suffix", [".part", ".tmp", ".incomplete"])
def test_a_partial_file_is_an_obstacle(upload: Path, suffix: str) -> None:
    (upload / f"model-2.safetensors{suffix}").touch()
    assert "still being written" in str(arrival(upload).obstacle())


def test_a_file_shorter_than_its_header_says_is_an_obstacle(upload: Path) -> None:
    weights = upload / "adapter_model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    assert "adapter_model.safetensors" in str(arrival(upload).obstacle())


@pytest.mark.parametrize(
    ("file", "obstacle"),
    [("adapter_config.json", "adapter_config.json, which .* is missing"), ("adapter_model.safetensors", "it has no")],
)
def test_a_missing_file_is_an_obstacle(upload: Path, file: str, obstacle: str) -> None:
    (upload / file).unlink()
    assert re.search(obstacle, str(arrival(upload).obstacle()))


def test_a_link_out_of_the_directory_is_an_obstacle(upload: Path) -> None:
    (upload.parent.parent / "secret.json").write_text("{}")
    (upload / "tokenizer.json").symlink_to(upload.parent.parent / "secret.json")
    assert "outside" in str(arrival(upload).obstacle())


@pytest.mark.parametrize("name", ["a/b", "a b", "a,b", "..", "a..b", ".hidden", "-rf", "", "ä", "x" * 101, "a\nb"])
def test_unsafe_names_are_refused(name: str) -> None:
    with pytest.raises(InputRefused, match="cannot be the name"):
        require_name(name)


@pytest.mark.parametrize("name", ["poet", "Qwen2.5-7B_lora.v2", "x" * 100])
def test_ordinary_names_are_accepted(name: str) -> None:
    assert require_name(name) == name


def test_every_write_changes_the_fingerprint_but_only_new_content_changes_the_digest(upload: Path) -> None:
    before = arrival(upload)
    fingerprint, digest = before.fingerprint, before.digest
    os.utime(upload / "adapter_config.json", ns=(1, 1))
    touched = arrival(upload)
    assert touched.fingerprint != fingerprint
    assert touched.digest == digest
    (upload / "adapter_config.json").write_text("{ }")
    assert arrival(upload).digest != digest


def test_a_marker_counts_only_if_nothing_was_written_after_it(upload: Path) -> None:
    assert not arrival(upload).is_marked_complete
    (upload / MARKER).touch()
    digest = arrival(upload).digest
    assert arrival(upload).is_marked_complete
    (upload / MARKER).unlink()
    assert arrival(upload).digest == digest
    (upload / MARKER).touch()
    later = (upload / MARKER).stat().st_mtime_ns + 1
    os.utime(upload / "adapter_config.json", ns=(later, later))
    assert not arrival(upload).is_marked_complete


def test_hidden_directories_and_files_are_not_arrivals(upload: Path) -> None:
    (upload.parent / ".uploading").mkdir()
    (upload.parent / "notes.txt").touch()
    assert [found.name for found in Inbox(upload.parent).arrivals()] == ["poet"]
    assert not list(Inbox(upload.parent / "nowhere").arrivals())


def test_a_missing_fine_tune_is_refused_with_a_list_of_those_present(upload: Path) -> None:
    with pytest.raises(InputRefused, match="it has: poet"):
        Inbox(upload.parent).require("pet")
    (upload / "adapter_config.json").unlink()
    with pytest.raises(InputRefused, match="not complete"):
        Inbox(upload.parent).require("poet")


def test_a_directory_elsewhere_is_linked_into_the_inbox(upload: Path, tmp_path: Path) -> None:
    inbox = Inbox(tmp_path / "other")
    assert inbox.link(upload).path.resolve() == upload
    assert inbox.link(upload).name == "poet"
    namesake = tmp_path / "elsewhere" / "poet"
    shutil.copytree(upload, namesake)
    with pytest.raises(DestinationRefused, match="exists and is not"):
        inbox.link(namesake)
