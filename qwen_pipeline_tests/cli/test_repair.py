"""``repair`` for people and for scripts."""

from pathlib import Path

import pytest

from qwen_pipeline_tests.cli.terminal import qwen_pipeline
from qwen_pipeline_tests.codes import Packing, write_checkpoint_of_codes


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    """Three groups of 16, which two ranks cannot share."""
    write_checkpoint_of_codes(tmp_path / "imported", Packing(method="gptq", group_size=16), width=48)
    return tmp_path / "imported"


def test_without_a_destination_it_only_says_what_it_takes(imported: Path, tmp_path: Path) -> None:
    ended = qwen_pipeline("repair", imported, "--tp", 2)
    assert ended.code == 0
    assert "3 -> 4" in ended.out
    assert "1.5 -> 2" in ended.out
    assert "Nothing was written" in ended.out
    assert list(tmp_path.iterdir()) == [imported]


def test_with_one_it_repairs_and_says_how_it_was_proven(imported: Path, tmp_path: Path) -> None:
    ended = qwen_pipeline("repair", imported, "--tp", 2, "--out", tmp_path / "repaired", "--json")
    assert (ended.code, ended.data["stage"]) == (0, "repaired")
    assert {check["name"]: check["passed"] for check in ended.data["checks"]} == {
        "whole_groups_on_every_rank": True,
        "live_weights_identical": True,
        "new_weights_are_zero": True,
        "config_follows_weights": True,
        "inputs_in_order": True,
    }
    assert (tmp_path / "repaired" / "model.safetensors").is_file()


def test_what_serves_already_is_left_alone(imported: Path, tmp_path: Path) -> None:
    ended = qwen_pipeline("repair", imported, "--tp", 1, "--out", tmp_path / "repaired")
    assert ended.code == 0
    assert "already serves on 1 ranks" in ended.out
    assert not (tmp_path / "repaired").exists()


def test_what_groups_cannot_cure_is_refused_with_what_does(tmp_path: Path) -> None:
    packing, torn = Packing(method="gptq", group_size=16), {"intermediate_size": 40}
    write_checkpoint_of_codes(tmp_path / "imported", packing, width=48, config=torn)
    ended = qwen_pipeline("repair", tmp_path / "imported", "--tp", 2, "--out", tmp_path / "repaired")
    assert ended.code == 2
    assert "2.5 groups of 16" in ended.err
    assert "qwen-pipeline pad --group-size 16 --tp 2" in " ".join(ended.err.split())
    assert not (tmp_path / "repaired").exists()
