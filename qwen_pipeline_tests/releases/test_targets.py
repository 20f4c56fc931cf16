"""Delivery of a promoted release: to a directory, and to a repository of Hugging Face."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from qwen_pipeline.config.loading import settings_from_values
from qwen_pipeline.errors import CheckFailed, EnvironmentFault, InputRefused
from qwen_pipeline.lineage.verification.records import read_record
from qwen_pipeline.lineage.verification.verify import verify
from qwen_pipeline.releases.promotion import promote, rollback
from qwen_pipeline_tests.releases.released import PRODUCT, Released

MANUAL = {"promote": "manual"}


def digits(release: Path) -> str:
    return read_record(release).step.content_digest.removeprefix("sha256:")[:16]


@pytest.mark.parametrize("hard_links", [False, True])
def test_a_directory_gets_each_release_once_and_its_pointer_last(
    released: Released, tmp_path: Path, hard_links: bool
) -> None:
    served = tmp_path / "models"
    target = {"kind": "directory", "path": served, "hard_links": hard_links}
    settings = released.settings(release={**MANUAL, "targets": [target]})
    first, second = released.make(settings, 1), released.make(settings, 2)
    (delivery,) = promote(settings, PRODUCT, release=first.name).deliveries
    link = served / PRODUCT / "production"
    assert (link.resolve(), delivery.pointed) == (served / PRODUCT / digits(first), True)
    assert verify(link).faults == []
    shared = [
        (link / name).stat().st_ino == (first / name).stat().st_ino for name in ("model.safetensors", "README.md")
    ]
    assert shared in ([hard_links] * 2, [False] * 2)  # False where the file system clones files

    (again,) = promote(settings, PRODUCT, release=first.name).deliveries
    assert again.files == []
    promote(settings, PRODUCT)
    assert link.resolve().name == digits(second)
    (back,) = rollback(settings, PRODUCT, reason="slow").deliveries
    assert (back.files, link.resolve().name) == ([], digits(first))


def test_a_damaged_or_closed_target_keeps_its_pointer_and_the_store_its_own(released: Released, tmp_path: Path) -> None:
    served = tmp_path / "models"
    settings = released.settings(release={**MANUAL, "targets": [{"kind": "directory", "path": served}]})
    first, second = released.make(settings, 1), released.make(settings, 2)
    promote(settings, PRODUCT, release=first.name)
    place = served / PRODUCT / digits(second)
    place.mkdir()
    (place / "config.json").write_text("{}")
    with pytest.raises(CheckFailed, match=rf"{digits(second)} is not the release: config\.json has bytes 2"):
        promote(settings, PRODUCT)
    assert released.pointer("production") == first
    assert (served / PRODUCT / "production").resolve().name == digits(first)

    (tmp_path / "file").touch()
    closed = released.settings(release={**MANUAL, "targets": [{"kind": "directory", "path": tmp_path / "file"}]})
    with pytest.raises(EnvironmentFault, match="cannot be delivered"):
        promote(closed, PRODUCT)


def test_object_storage_gets_each_release_once_and_its_pointer_last(released: Released, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    target = {"kind": "objects", "url": f"file://{bucket}"}
    settings = released.settings(release={**MANUAL, "targets": [target]})
    first, second = released.make(settings, 1), released.make(settings, 2)
    (delivery,) = promote(settings, PRODUCT, release=first.name).deliveries
    assert delivery.pointed
    assert verify(bucket / PRODUCT / digits(first)).faults == []
    pointer = bucket / PRODUCT / "production.json"
    assert json.loads(pointer.read_bytes())["release"] == f"{PRODUCT}/{digits(first)}"
    (again,) = promote(settings, PRODUCT, release=first.name).deliveries
    assert again.files == []

    place = bucket / PRODUCT / digits(second)
    place.mkdir()
    (place / "config.json").write_text("{}")
    with pytest.raises(CheckFailed, match=r"is not the release: config\.json has other bytes"):
        promote(settings, PRODUCT)
    assert json.loads(pointer.read_bytes())["release"] == f"{PRODUCT}/{digits(first)}"
    assert released.pointer("production") == first
    (place / "config.json").unlink()
    promote(settings, PRODUCT)
    assert json.loads(pointer.read_bytes())["release"] == f"{PRODUCT}/{digits(second)}"


def test_a_target_has_a_place() -> None:
    with pytest.raises(InputRefused, match="a target of kind 'huggingface' has 'repository', and not 'path' or 'url'"):
        settings_from_values({"release": {"targets": [{"kind": "huggingface", "path": "x"}]}})


def test_an_upload_is_only_listed_by_default(released: Released) -> None:
    target = {"kind": "huggingface", "repository": "acme/{product}-gptq"}
    settings = released.settings(release={**MANUAL, "targets": [target]})
    release = released.make(settings, 1)
    (delivery,) = promote(settings, PRODUCT).deliveries
    assert (delivery.dry_run, delivery.pointed) == (True, False)
    assert delivery.place == f"acme/{PRODUCT}-gptq@release-{digits(release)}"
    assert set(delivery.files) == {
        path.relative_to(release).as_posix() for path in release.rglob("*") if path.is_file()
    }


def test_a_hub_that_does_not_answer_leaves_production(released: Released, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    target = {"kind": "huggingface", "repository": "acme/{product}", "dry_run": False}
    settings = released.settings(release={**MANUAL, "targets": [target]})
    released.make(settings, 1)
    with pytest.raises(EnvironmentFault, match=r"create_repo of acme/bot failed: "):
        promote(settings, PRODUCT)
    assert not (released.store / "releases" / PRODUCT / "production").exists()


@dataclass(frozen=True)
class Entry:
    """A file as the hub lists it: large ones by SHA-256, small ones by Git's SHA-1."""

    path: str
    blob_id: str
    lfs: Any


@dataclass
class Hub:
    """The calls of ``HfApi`` that a delivery makes, on branches in memory; it may lose a byte."""

    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    calls: list[str] = field(default_factory=list[str])
    loses: str = ""

    def create_repo(self, repo_id: str, **_: Any) -> None:
        self.calls.append(f"create {repo_id}")

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:  # noqa: ARG002
        self.branches.setdefault(branch, {})

    def upload_folder(self, repo_id: str, *, folder_path: Path, revision: str, **_: Any) -> None:  # noqa: ARG002
        self.calls.append(f"upload {revision}")
        files = {path.relative_to(folder_path).as_posix(): path for path in folder_path.rglob("*") if path.is_file()}
        self.branches[revision] = {name: path.read_bytes() for name, path in files.items()}
        if self.loses:
            self.branches[revision][self.loses] = b"?"

    def list_repo_tree(self, repo_id: str, *, revision: str, recursive: bool) -> Iterator[Entry]:  # noqa: ARG002
        for name, data in self.branches[revision].items():
            large = type("Lfs", (), {"sha256": hashlib.sha256(data).hexdigest()}) if len(data) > 10_000 else None
            yield Entry(name, hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), large)


def test_a_repository_gets_a_branch_that_is_read_back_and_then_main(
    released: Released, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    target = {"kind": "huggingface", "repository": "acme/{product}", "dry_run": False}
    settings = released.settings(release={**MANUAL, "targets": [target]})
    release = released.make(settings, 1)
    branch = f"release-{digits(release)}"
    hub.loses = "config.json"
    with pytest.raises(CheckFailed, match=r"is not the release: config\.json has other bytes"):
        promote(settings, PRODUCT)
    assert not (released.store / "releases" / PRODUCT / "production").exists()
    hub.loses = ""
    hub.calls.clear()
    promote(settings, PRODUCT)
    assert hub.calls == ["create acme/bot", f"upload {branch}", "upload main"]
    hub.calls.clear()
    promote(settings, PRODUCT)
    assert hub.calls == ["create acme/bot"]
