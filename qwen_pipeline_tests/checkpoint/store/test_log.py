"""The log of a store: what is appended, and what is not."""

import hashlib
import subprocess
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from qwen_pipeline.checkpoint.store import log
from qwen_pipeline.checkpoint.store.origin import (
    checked_out_commit,
    code_digest,
    installed_packages,
    origin,
    started_through,
)
from qwen_pipeline.lineage.log_proof import open_log


def finished(store: Path, name: str, text: str) -> Path:
    root = store / "merged" / "bot" / name
    root.mkdir(parents=True, exist_ok=True)
    (root / "manifest.json").write_text(text)
    return root


def test_a_line_is_appended_once_and_continues_the_one_before(tmp_path: Path) -> None:
    one, other = finished(tmp_path, "1", "a"), finished(tmp_path, "2", "b")
    assert log.logged_store(one) is None
    for root in (one, other, one, other):
        log.record(tmp_path, root, "finished")
    finished(tmp_path, "1", "made again")
    log.record(tmp_path, one, "finished")
    log.record(tmp_path, one, "signed", detail="key")
    entries = list(log.read_log(tmp_path))
    assert [(entry.number, entry.event, entry.path) for entry in entries] == [
        (1, "finished", "merged/bot/1"),
        (2, "finished", "merged/bot/2"),
        (3, "finished", "merged/bot/1"),
        (4, "signed", "merged/bot/1"),
    ]
    assert [entry.previous for entry in entries] == [log.START, *(entry.digest for entry in entries[:-1])]
    assert log.head(tmp_path) == (4, entries[-1].digest)
    assert log.logged_store(one) == tmp_path
    assert not open_log(tmp_path).fault


@pytest.mark.parametrize("line", [b"{}", b"?", b"[]", b"\xff", b'{"number": 1, "path": "merged/bot/1"}'])
def test_a_damaged_line_is_named_and_stops_no_stage(tmp_path: Path, line: bytes) -> None:
    root = finished(tmp_path, "1", "a")
    (tmp_path / log.LOG).write_bytes(line + b"\n")
    assert "line 1" in open_log(tmp_path).fault
    log.record(tmp_path, root, "finished")
    assert len((tmp_path / log.LOG).read_bytes().splitlines()) == 2


def test_the_end_of_a_log_is_stated_beside_it(tmp_path: Path) -> None:
    for name in "123":
        log.record(tmp_path, finished(tmp_path, name, name), "finished")
    file, whole = tmp_path / log.LOG, (tmp_path / log.LOG).read_bytes()
    lines = whole.splitlines(keepends=True)
    for changed, fault in (
        (b"".join(lines[:2]), "log.head states 3 lines, log.jsonl has 2: lines were removed"),
        (whole[:-1], "log.head states 3 lines, log.jsonl has 2: lines were removed"),
        (b"".join([*lines[:2], lines[2].replace(b"finished", b"signed")]), "line 3 of log.jsonl is not the one"),
        (b"", "log.head states 3 lines, log.jsonl has 0: lines were removed"),
    ):
        file.write_bytes(changed)
        assert open_log(tmp_path).fault.startswith(fault)
        for name in "45":
            log.record(tmp_path, finished(tmp_path, name, name), "finished")
        assert open_log(tmp_path).fault  # what is appended later hides nothing
    file.write_bytes(whole + lines[2][:9])
    assert not open_log(tmp_path).fault  # a line that is being written
    (tmp_path / log.HEAD).write_bytes(b"{}")
    assert "log.head states no line" in open_log(tmp_path).fault


def test_the_outer_trigger_counts_unless_a_sensor_requested_the_run() -> None:
    with started_through("command qwen-pipeline run"):
        with started_through("job process_fine_tune", run="1", otherwise=True):
            assert {"trigger": "command qwen-pipeline run", "run": "1"}.items() <= origin().items()
        with started_through("sensor fine_tune_inbox"):
            assert origin()["trigger"] == "sensor fine_tune_inbox"
    assert "trigger" not in origin()


def test_code_and_packages_are_stated_as_other_tools_list_them(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "a").mkdir(parents=True)
    for name in ("__init__.py", "a/b.py"):
        (package / name).write_text(name)
    listed = subprocess.run(
        ["sha256sum", "package/__init__.py", "package/a/b.py"], cwd=tmp_path, stdout=subprocess.PIPE
    )
    assert code_digest(package) == f"sha256:{hashlib.sha256(listed.stdout).hexdigest()}"
    installed = {str(canonicalize_name(each.metadata["Name"])): each.version for each in distributions()}
    stated = dict(line.split("==") for line in installed_packages())
    assert stated == {name: installed[name] for name in stated}
    assert {"torch", "dagster", "safetensors"} <= stated.keys()


def test_the_commit_of_a_packed_branch_is_found(tmp_path: Path) -> None:
    (tmp_path / "HEAD").write_text("ref: refs/heads/main\n")
    assert checked_out_commit(tmp_path) is None
    (tmp_path / "packed-refs").write_text("# pack-refs with: peeled\n1234 refs/heads/other\nabcd refs/heads/main\n")
    assert checked_out_commit(tmp_path) == "abcd"
    (tmp_path / "HEAD").write_text("5678\n")
    assert checked_out_commit(tmp_path) == "5678"
