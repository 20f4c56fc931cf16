"""Tampering with any file of any stage, at random: each change is found and named, and nothing else is."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_pipeline.checkpoint.store import log
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.lineage.pointers import judge, link_of, move
from qwen_pipeline.lineage.sign import load_key
from qwen_pipeline_tests.lineage.chained import NAME, Chained

STAGES = ("padded", "quantized", "validated", "published")
FEW, MANY = 12, int(os.environ.get("FUZZ_EXAMPLES", "30"))
"""Changes in ``make test``, and in ``make test-slow`` if the variable does not say otherwise."""


@dataclass(frozen=True)
class Tampered:
    """What was done to a store, and a word that the audit must name."""

    deed: str
    named: str


def flip_bit(chained: Chained, draw: st.DrawFn) -> Tampered:
    path = draw(st.sampled_from([*files(chained), chained.store / log.LOG, chained.store / log.HEAD]))
    data = bytearray(path.read_bytes())
    place = draw(st.integers(0, len(data) * 8 - 1))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    return Tampered(f"bit {place} of {path}", path.name)


def swap_files(chained: Chained, draw: st.DrawFn) -> Tampered:
    """Put a file of one stage in the place of another, as with shards of two models.

    In the place of a manifest it leaves nothing that could name other files.
    """
    one = draw(st.sampled_from(files(chained)))
    others = [path for path in files(chained) if path.suffix == one.suffix and path.read_bytes() != one.read_bytes()]
    other = draw(st.sampled_from(others or [one.with_name("config.json")]))
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    names = (one.name, other.name)
    return Tampered(f"{one} and {other} swapped", "manifest.json" if "manifest.json" in names else one.name)


def remove_file(chained: Chained, draw: st.DrawFn) -> Tampered:
    path = draw(st.sampled_from([path for path in files(chained) if path.name != "manifest.json"]))
    path.unlink()
    return Tampered(f"{path} removed", path.name)


def add_file(chained: Chained, draw: st.DrawFn) -> Tampered:
    """Add a file, or a link to a directory elsewhere."""
    path = chained.output(draw(st.sampled_from(STAGES))) / "modeling_qwen2.py"
    if is_link := draw(st.booleans()):
        path.symlink_to(chained.root / "merged")
    else:
        path.write_text("import os\n")
    return Tampered(f"{path} added, a link: {is_link}", path.name)


def edit_manifest(chained: Chained, draw: st.DrawFn) -> Tampered:
    """Change one value of a manifest, and leave it valid."""
    path = chained.output(draw(st.sampled_from(STAGES))) / "manifest.json"
    manifest = json.loads(path.read_bytes())
    change = draw(st.sampled_from(["inputs", "spec", "code_version", "result", "run", "content_digest"]))
    match change:
        case "inputs":
            role = draw(st.sampled_from(sorted(manifest["derivation"]["inputs"])))
            manifest["derivation"]["inputs"][role] = "sha256:" + "0" * 64
        case "spec":
            manifest["derivation"]["spec"]["added"] = 1
        case "code_version":
            manifest["derivation"]["code_version"] += "0"
        case "result":
            manifest["result"]["added"] = 1
        case "run":
            manifest["run"]["seconds"] += 1
        case _:
            manifest["content_digest"] = "sha256:" + "0" * 64
    path.write_text(json.dumps(manifest))
    return Tampered(f"{change} of {path}", "manifest.json" if change in ("result", "run") else "")


def edit_report(chained: Chained, draw: st.DrawFn) -> Tampered:
    path = chained.output("validated") / "report.json"
    report = json.loads(path.read_bytes())
    check = draw(st.sampled_from(report["checks"]))
    check["passed"] = not check["passed"]
    path.write_text(json.dumps(report))
    return Tampered(f"{check['name']} of {path}", "report.json")


def replace_config(chained: Chained, draw: st.DrawFn) -> Tampered:
    """Change one value of a config, and leave it valid."""
    path = chained.output(draw(st.sampled_from(("padded", "quantized", "published")))) / "config.json"
    config = json.loads(path.read_bytes())
    name = draw(st.sampled_from(sorted(config)))
    config[name] = draw(st.sampled_from([each for each in (0, 1, "", None) if each != config[name]]))
    path.write_text(json.dumps(config))
    return Tampered(f"{name} of {path}", path.name)


def edit_log(chained: Chained, draw: st.DrawFn) -> Tampered:
    """Remove, repeat or change any line, or cut off the end."""
    path = chained.store / log.LOG
    lines = path.read_bytes().splitlines(keepends=True)
    place = draw(st.integers(0, len(lines) - 1))
    changed = json.loads(lines[place]) | {"time": "2020-01-01T00:00:00+00:00"}
    match deed := draw(st.sampled_from(["remove", "repeat", "change", "cut"])):
        case "remove":
            del lines[place]
        case "repeat":
            lines.insert(place, lines[place])
        case "change":
            lines[place] = json.dumps(changed, ensure_ascii=False).encode() + b"\n"
        case _:
            del lines[place:]
    path.write_bytes(b"".join(lines))
    return Tampered(f"{deed} line {place + 1} of {path}", log.LOG)


def delete_parent(chained: Chained, draw: st.DrawFn) -> Tampered:
    stage = draw(st.sampled_from(STAGES[:-1]))
    shutil.rmtree(chained.output(stage))
    return Tampered(f"{stage} deleted", f"{stage} is ")


def replay_pointer(chained: Chained, draw: st.DrawFn) -> Tampered:
    """Put a pointer back to where the log does not say it leads, or remove it."""
    key = load_key(chained.key)
    move(chained.store, NAME, "candidate", chained.release, reason="made", key=key)
    link = link_of(chained.store, NAME, "candidate")
    link.unlink()
    if other := draw(st.sampled_from(["", "../../published/bot/0123456789abcdef", str(chained.release)])):
        link.symlink_to(other)
    return Tampered(f"{link} leads to {other or 'nothing'}", "releases/bot/candidate")


def forge_statement(chained: Chained, draw: st.DrawFn) -> Tampered:
    """Approve or revoke a release without a key, in a line that continues the log."""
    move(chained.store, NAME, "candidate", chained.release, reason="made", key=load_key(chained.key))
    approved = draw(st.booleans())
    judge(chained.store, NAME, chained.release, approved=approved, reason="forged")
    return Tampered(f"forged, approved: {approved}", f"{'approved' if approved else 'revoked'} published/bot")


DEEDS: tuple[Callable[[Chained, st.DrawFn], Tampered], ...] = (
    flip_bit,
    flip_bit,
    swap_files,
    remove_file,
    add_file,
    edit_manifest,
    edit_report,
    replace_config,
    delete_parent,
    edit_log,
    replay_pointer,
    forge_statement,
)


def files(chained: Chained) -> list[Path]:
    found = [path for stage in STAGES for path in chained.output(stage).rglob("*") if path.is_file()]
    return sorted(path for path in found if path.stat().st_size)


def complaints(chained: Chained) -> str:
    """Return everything that an audit finds wrong, as one text."""
    try:
        found = chained.audit()
    except CheckpointRefused as refused:
        return refused.what
    absent = [node for node in found.nodes.values() if node.state in ("dropped", "claimed")]
    return "\n".join([*found.faults, *(f"{node.name} is {node.state}" for node in absent if node.name in STAGES)])


@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_every_change_is_found_and_named(chained: Chained, tmp_path: Path, examples: int) -> None:
    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(data=st.data(), deed=st.sampled_from(DEEDS))
    def tamper(data: st.DataObject, deed: Callable[[Chained, st.DrawFn], Tampered]) -> None:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        copy = chained.copy(tmp_path / "copy")
        tampered = deed(copy, data.draw)  # pyright: ignore[reportArgumentType]
        found = complaints(copy)
        assert found, tampered.deed
        assert tampered.named in found, tampered.deed

    assert not complaints(chained)
    tamper()
