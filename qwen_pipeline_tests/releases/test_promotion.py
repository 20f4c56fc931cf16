"""Candidate and production: gates, approval, promotion and rollback, in Python and on the command line."""

import os
import random
import signal
from pathlib import Path

import pytest

from qwen_pipeline.audits import library_of, sources_of
from qwen_pipeline.checkpoint.store import log
from qwen_pipeline.config.file import FILE_VARIABLE
from qwen_pipeline.errors import CheckFailed, CheckpointRefused, InputRefused
from qwen_pipeline.lineage.audit import audit
from qwen_pipeline.lineage.log_proof import open_log
from qwen_pipeline.lineage.pointers import history, link_of, move, pointed
from qwen_pipeline.lineage.statements import path_of
from qwen_pipeline.lineage.verification.records import read_record
from qwen_pipeline.releases.promotion import advance, approve, offer, promote, rollback
from qwen_pipeline.releases.versions import known_products, versions
from qwen_pipeline_tests.cli.terminal import qwen_pipeline
from qwen_pipeline_tests.releases.released import PRODUCT, Released
from qwen_pipeline_tests.test_kills import die_at


def audit_faults(released: Released, release: Path) -> list[str]:
    settings = released.settings()
    return audit(
        release, library=library_of([release], settings, None), sources=sources_of(release, settings, None)
    ).faults


def states(released: Released) -> dict[str, tuple[str, ...]]:
    """Return the name of each release -> its state and its pointers."""
    return {each.path.name: (each.state, *each.pointers) for each in versions(released.settings())[PRODUCT]}


def test_production_follows_unless_a_release_is_worse_and_goes_back(released: Released) -> None:
    settings = released.settings()
    first = released.make(settings, 1)
    assert released.pointer("candidate") == first
    assert advance(settings, PRODUCT).moved
    assert not advance(settings, PRODUCT).moved
    link = link_of(released.store, PRODUCT, "production")
    assert link.readlink() == Path("..", "..", "published", PRODUCT, first.name)

    second = released.make(settings, 2, growth=1.2)
    assert states(released) == {second.name: ("ready", "candidate"), first.name: ("ready", "production")}
    worse = advance(settings, PRODUCT)
    assert not worse.in_production
    assert [report.name for report in worse.reports if not report.passed] == ["not_worse_than_production"]
    with pytest.raises(CheckFailed, match=r"Regressed by 20.0%.*\n.*--accept-regression"):
        promote(settings, PRODUCT)
    with pytest.raises(InputRefused, match="No reason was given"):
        promote(settings, PRODUCT, accept_regression=True)
    assert promote(settings, PRODUCT, accept_regression=True, reason="better at code").moved
    assert released.pointer("production") == second

    files = (path for path in released.store.rglob("*") if path.is_file() and path.name != log.HEAD)
    inodes = {path: path.stat().st_ino for path in files}
    back = rollback(settings, PRODUCT, reason="wrong language")
    assert (back.release, back.before, released.pointer("production")) == (first, second, first)
    assert {path: path.stat().st_ino for path in inodes} == inodes
    assert states(released) == {second.name: ("revoked", "candidate"), first.name: ("ready", "production")}
    with pytest.raises(CheckFailed, match=r"Revoked by .*wrong language"):
        promote(settings, PRODUCT, accept_regression=True, reason="again")
    with pytest.raises(InputRefused, match="no earlier release in production to go back to"):
        rollback(settings, PRODUCT, reason="once more")
    approve(settings, PRODUCT, reason="mended the prompt")
    assert promote(settings, PRODUCT, accept_regression=True, reason="again").moved
    stated = history(released.store, PRODUCT).statements
    assert [(each.event, each.pointer, each.reason) for each in stated[-4:]] == [
        ("revoked", "", "wrong language"),
        ("pointed", "production", "wrong language"),
        ("approved", "", "mended the prompt"),
        ("pointed", "production", "again"),
    ]
    assert not open_log(released.store).fault


def test_what_is_damaged_or_recalled_is_not_promoted_and_not_gone_back_to(released: Released) -> None:
    settings = released.settings(release={"promote": "manual"})
    first, damaged, last = (released.make(settings, number) for number in (1, 2, 3))
    for release in (first, damaged, last):
        promote(settings, PRODUCT, release=release.name)
    with (damaged / "config.json").open("r+b") as file:
        file.write(b" ")
    with pytest.raises(CheckFailed, match=r"verdict_stands: files: config\.json has sha256"):
        promote(settings, PRODUCT, release=damaged.name)
    assert rollback(settings, PRODUCT, reason="slow").release == first

    digest = read_record(last).step.content_digest
    approve(settings, PRODUCT, release=digest, reason="was the network")
    log.append(released.store, "recalled", digest, "", "no licence")
    with pytest.raises(CheckFailed, match=r"policy\.recalled: It descends from what was recalled: published"):
        promote(settings, PRODUCT, release=digest[:14])
    assert states(released)[last.name] == ("recalled", "candidate")
    with pytest.raises(InputRefused, match="names 0 releases of bot"):
        promote(settings, PRODUCT, release="abcdef")
    with pytest.raises(InputRefused, match="has no release"):
        promote(settings, "another")


def test_approval_counts_if_a_trusted_key_signed_it(released: Released) -> None:
    ada, mallory = released.key("ada"), released.key("mallory")
    signing = {"key": released.key("release"), "trusted": [ada.with_suffix(".pub")]}
    settings = released.settings(signing=signing, release={"approval": "required"})
    release = released.make(settings, 1)
    waiting = advance(settings, PRODUCT)
    assert not waiting.in_production
    (report,) = (report for report in waiting.reports if report.blocks)
    assert f"qwen-pipeline approve bot --release {release.name}" in report.detail
    with pytest.raises(InputRefused, match="do not trust the key"):
        approve(settings, PRODUCT, reason="fine", key=mallory)
    approve(released.settings(), PRODUCT, reason="unsigned")
    assert not advance(settings, PRODUCT).in_production
    approve(settings, PRODUCT, reason="read the report", by="Ada", key=ada)
    found = advance(settings, PRODUCT)
    assert found.moved
    assert found.reports[1].detail.startswith("Approved by Ada at 20")
    (move_of_production,) = (
        each for each in history(released.store, PRODUCT).statements if each.pointer == "production"
    )
    assert move_of_production.keyid
    move(released.store, PRODUCT, "production", release, reason="by hand", key=None)
    assert released.pointer("production") == release


def test_the_commands(released: Released, monkeypatch: pytest.MonkeyPatch) -> None:
    released.root.mkdir()
    file = released.root / "settings.toml"
    file.write_text('workspace = "."\n[release]\napproval = "required"\n')
    monkeypatch.setenv(FILE_VARIABLE, str(file))
    assert "No releases yet" in qwen_pipeline("releases").out
    release = released.make(released.settings(), 1)
    assert "waits for approval" in qwen_pipeline("promote", PRODUCT).err
    assert qwen_pipeline("releases", PRODUCT, "--serve").code == 2
    approved = qwen_pipeline("approve", PRODUCT, "--reason", "tried it", "--json")
    assert approved.data["promotion"]["moved"], approved.err
    assert released.pointer("production") == release
    listed = qwen_pipeline("releases", "--json").data["products"][PRODUCT]
    assert [(each["state"], each["pointers"]) for each in listed] == [("approved", ["candidate", "production"])]
    assert release.name in qwen_pipeline("releases").out
    assert "In production already" in qwen_pipeline("promote", PRODUCT).out
    link = link_of(released.store, PRODUCT, "production")
    serving = qwen_pipeline("releases", PRODUCT, "--serve").out.split()
    assert serving == ["vllm", "serve", str(link), "--tensor-parallel-size", "2"]
    assert qwen_pipeline("rollback", PRODUCT, "--reason", "slow").code == 2
    assert qwen_pipeline("approve", "no/product", "--reason", "x").code == 2
    assert qwen_pipeline("approve", PRODUCT, "--reason", " ").code == 2
    assert known_products(released.settings()) == [PRODUCT]


def test_the_recipes_of_a_fine_tune_have_pointers_of_their_own(released: Released) -> None:
    settings = released.settings()
    first, second = released.make(settings, 1), released.make(settings, 2)
    offer(settings, f"{PRODUCT}@fast", first)
    assert advance(settings, f"{PRODUCT}@fast").moved
    assert advance(settings, f"{PRODUCT}@default").moved
    assert released.pointer("production") == second
    assert link_of(released.store, f"{PRODUCT}@fast", "production").resolve() == first
    assert list(versions(settings)) == [PRODUCT, f"{PRODUCT}@fast"]
    assert audit_faults(released, second) == []


def test_a_product_of_an_earlier_version_has_its_last_release(released: Released) -> None:
    settings = released.settings()
    release = released.make(settings, 1)
    for name in (log.LOG, log.HEAD):
        (released.store / name).unlink()
    for link in (released.store / "releases" / PRODUCT).iterdir():
        link.unlink()
    (released.store / "releases" / PRODUCT).rmdir()
    assert known_products(settings) == [PRODUCT]
    assert promote(settings, f"{PRODUCT}").release == release


@pytest.mark.slow
def test_a_kill_in_a_move_leaves_the_old_or_the_new_release(released: Released) -> None:
    """The pointer always leads to a whole release, and the next move follows the log."""
    settings, moment = released.settings(), random.Random(7)
    releases = [released.make(settings, number) for number in (1, 2)]
    deaths = 0
    for attempt in range(24):
        target, call = releases[attempt % 2], moment.randrange(1, 10)
        if (child := os.fork()) == 0:
            try:
                die_at(call)
                move(released.store, PRODUCT, "candidate", target, reason=f"attempt {attempt}")
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL)
        deaths += code != 0
        assert released.pointer("candidate") in releases
        move(released.store, PRODUCT, "production", target, reason="settles the candidate too")
        stated = history(released.store, PRODUCT)
        for pointer in ("candidate", "production"):
            assert stated.target(pointer) == released.store / pointed(released.store, PRODUCT, pointer)
    assert 0 < deaths < 24
    assert not [path for path in (released.store / "releases").rglob("*") if path.name.startswith(".c")]


def test_moves_of_a_changed_log_are_refused(released: Released) -> None:
    settings = released.settings()
    release = released.make(settings, 1)
    lines = (released.store / log.LOG).read_text().splitlines(keepends=True)
    (released.store / log.LOG).write_text("".join(lines[1:]))
    with pytest.raises(CheckpointRefused, match="was changed"):
        advance(settings, PRODUCT)
    assert released.pointer("candidate") == release
    assert path_of(release) == f"published/{PRODUCT}/{release.name}"
