"""A base is found as a directory or a snapshot; if it cannot be had, the error says why."""

from pathlib import Path

import pytest

from qwen_pipeline.errors import CheckpointRefused, EnvironmentFault
from qwen_pipeline.models.hub import find_base


def test_a_directory_is_returned_unchanged(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    assert find_base("base", relative_to=tmp_path) == tmp_path / "base"
    assert find_base(str(tmp_path / "base")) == tmp_path / "base"


@pytest.mark.parametrize("name", ["./missing", "/missing/base", "a/b/c", "../x", "~no-such-user/base", ""])
def test_a_name_that_is_neither_a_directory_nor_a_hub_id_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointRefused, match="neither a directory"):
        find_base(name or "not an id", relative_to=tmp_path)


def test_without_a_connection_an_environment_fault_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EnvironmentFault, match="Qwen/None-Such at revision v1 is not in the hub's cache"):
        find_base("Qwen/None-Such", revision="v1")


def test_a_snapshot_in_the_cache_needs_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--base"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert find_base("some/base") == snapshot
