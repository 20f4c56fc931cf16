"""Pointers and statements that were changed by hand: each change is found and named by audits."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline.audits import audit_releases, library_of, sources_of
from qwen_pipeline.checkpoint.store import log
from qwen_pipeline.config import Settings
from qwen_pipeline.config.inputs import trusted_keys
from qwen_pipeline.lineage.audit import audit
from qwen_pipeline.lineage.pointers import move
from qwen_pipeline.releases.promotion import approve, promote
from qwen_pipeline_tests.releases.released import PRODUCT, Released


@pytest.fixture
def settings(released: Released) -> Settings:
    """Make three signed releases, of which the second is approved and in production."""
    settings = released.settings(signing={"key": released.key("release")}, release={"approval": "required"})
    for number in (1, 2):
        released.make(settings, number)
        approve(settings, PRODUCT, reason=f"read report {number}", by="Ada")
        promote(settings, PRODUCT)
    released.make(settings, 3)
    return settings


def faults(released: Released, settings: Settings) -> list[str]:
    root = released.pointer("candidate")
    return audit(
        root,
        library=library_of([root], settings, None),
        sources=sources_of(root, settings, None),
        stated_by=trusted_keys(settings) or (),
    ).faults


def relink(link: Path, target: str) -> None:
    link.unlink()
    link.symlink_to(target)


def rewrite_log(store: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Change the lines of a log, and chain them anew, as a careful forger would."""
    previous, out = log.START, b""
    for number, entry in enumerate(change([json.loads(line) for line in (store / log.LOG).open()]), 1):
        line = json.dumps({**entry, "number": number, "previous": previous}, ensure_ascii=False).encode()
        previous, out = hashlib.sha256(line).hexdigest(), out + line + b"\n"
    (store / log.LOG).write_bytes(out)
    (store / log.HEAD).write_text(json.dumps({"lines": out.count(b"\n"), "sha256": previous}))


def test_sound_pointers_are_attested(released: Released, settings: Settings) -> None:
    assert faults(released, settings) == []
    found = {each.path: (each.state, list(each.pointers)) for each in audit_releases(settings)}
    # the store has releases alone, without the stages before them
    assert found[released.pointer("production")] == ("orphaned", [f"{PRODUCT}/production"])


def test_a_replayed_pointer_is_named(released: Released, settings: Settings) -> None:
    now = released.pointer("production")
    first = next(
        path for path in now.parent.iterdir() if path.name not in (now.name, released.pointer("candidate").name)
    )
    relink(released.store / "releases" / PRODUCT / "production", f"../../published/{PRODUCT}/{first.name}")
    (fault,) = faults(released, settings)
    assert fault.startswith(
        f"pointers_are_logged: releases/{PRODUCT}/production leads to published/{PRODUCT}/{first.name}"
    )
    assert {each.state for each in audit_releases(settings)} == {"tampered"}


def test_a_pointer_without_a_line_is_named(released: Released, settings: Settings) -> None:
    folder = released.store / "releases" / PRODUCT
    (folder / "canary").symlink_to(f"../../published/{PRODUCT}/{released.pointer('candidate').name}")
    assert "canary leads to published" in faults(released, settings)[0]
    (folder / "canary").unlink()
    elsewhere = released.root / "published" / PRODUCT / released.pointer("production").name
    relink(folder / "production", str(elsewhere))
    assert f"leads to {elsewhere}" in faults(released, settings)[0]
    (folder / "production").unlink()
    assert "production leads to nothing" in faults(released, settings)[0]


def test_an_unsigned_move_is_named_where_signing_is_on(released: Released, settings: Settings) -> None:
    move(released.store, PRODUCT, "production", released.pointer("candidate"), reason="by hand")
    (fault,) = faults(released, settings)
    assert fault.startswith("statements_are_signed: No key of ")
    assert "pointed production of bot" in fault
    approve(settings, PRODUCT, reason="read report 3")
    assert promote(settings, PRODUCT).moved
    assert faults(released, settings) == []


def test_a_statement_that_was_copied_to_another_place_is_named(released: Released, settings: Settings) -> None:
    """A signed approval of one release cannot be used again, nor moved, nor given to another release."""

    def again(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [*lines, *(line for line in lines if line["event"] == "approved")]

    rewrite_log(released.store, again)
    assert "that was copied from another place: approved published/bot" in faults(released, settings)[0]


def test_an_approval_of_other_bytes_is_named(released: Released, settings: Settings) -> None:
    candidate = released.pointer("candidate")

    def of_the_candidate(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            line | {"path": f"published/{PRODUCT}/{candidate.name}"} if line["event"] == "approved" else line
            for line in lines
        ]

    rewrite_log(released.store, of_the_candidate)
    assert any("holds a statement about something else" in fault for fault in faults(released, settings))
