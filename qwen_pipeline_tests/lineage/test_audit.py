"""Audits of a real chain: what is proven, claimed, dropped, and what contradicts the records."""

import json
import shutil
from pathlib import Path

import pytest

from qwen_pipeline.checkpoint.store import log
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.lineage.audit import Audit, audit
from qwen_pipeline.lineage.library import Sources, open_library
from qwen_pipeline.lineage.verification.envelopes import load_public_key
from qwen_pipeline_tests.lineage.chained import Chained


def test_a_sound_chain_is_proven_back_to_its_source(chained: Chained) -> None:
    found = chained.audit()
    assert not found.faults
    nodes = list(found.nodes.values())
    proven = {node.name for node in nodes if node.state == "proven"}
    assert {"published", "quantized", "padded", "validated"} <= proven
    assert next(node.state for node in nodes if node.path == chained.root / "merged") == "proven"
    assert {node.name for node in nodes} - proven <= {"calibration", "text", "base"}  # digests of tokens
    verdicts = {finding.name: finding.verdict for finding in found.findings}
    assert verdicts["padding_before_quantization"] == "proven"
    assert verdicts["validated_is_published"] == "proven"
    assert verdicts["validation_measured_this_chain"] == "proven"
    assert verdicts["padding_map_of_padded"] == "proven"
    assert verdicts["manifests_are_logged"] == "proven"
    assert verdicts["log_is_that_of_signing"] == "proven"
    assert "refuted" not in verdicts.values()
    assert json.loads(json.dumps(found.to_json()))["sound"]


def test_a_dropped_parent_is_known_from_later_stages(chained: Chained, tmp_path: Path) -> None:
    copy = chained.copy(tmp_path / "copy")
    shutil.rmtree(copy.output("padded"))
    found = copy.audit()
    states = {node.name: node.state for node in found.nodes.values()}
    assert (states["padded"], states["quantized"], states["validated"]) == ("dropped", "proven", "proven")
    shutil.rmtree(copy.root / "merged")
    without_source = copy.audit()
    assert {node.name: node.state for node in without_source.nodes.values()}["padded"] == "attested"
    assert verdict_of_order(without_source) == "attested"
    (copy.release / "model.sig").unlink()
    unsigned = audit(copy.release, library=open_library([copy.store]), sources=Sources([]))
    assert {node.name: node.state for node in unsigned.nodes.values()}["padded"] == "claimed"
    assert verdict_of_order(unsigned) == "claimed"
    assert not found.faults + without_source.faults + unsigned.faults


def test_a_release_alone_is_attested_by_its_signature(chained: Chained, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(chained.release, tmp_path / "release"))
    key = load_public_key(chained.public_key)
    found = audit(alone, library=open_library([alone]), sources=Sources([]), keys=[key])
    states = {node.name: node.state for node in found.nodes.values()}
    assert (states["published"], states["quantized"], states["validated"]) == ("proven", "attested", "attested")
    assert verdict_of_order(found) == "attested"
    assert "release.pub" in next(node.detail for node in found.nodes.values() if node.name == "padded")
    with (alone / "config.json").open("a") as file:
        file.write(" ")
    changed = audit(alone, library=open_library([alone]), sources=Sources([]), keys=[key])
    assert "attested" not in {node.state for node in changed.nodes.values()}


def verdict_of_order(found: Audit) -> str:
    return {finding.name: finding.verdict for finding in found.findings}["padding_before_quantization"]


def test_what_something_else_than_retention_removed_is_named(chained: Chained, tmp_path: Path) -> None:
    """A manifest that was put where retention keeps them says nothing without the line of the log."""
    copy = chained.copy(tmp_path / "copy")
    padded = copy.output("padded")
    kept = copy.store / "dropped" / padded.relative_to(copy.store)
    shutil.copytree(padded, kept, ignore=lambda _, names: [name for name in names if name != "manifest.json"])
    shutil.rmtree(padded)

    def found() -> tuple[str, str]:
        audited = copy.audit()
        (removals,) = (each for each in audited.findings if each.name == "removals_are_logged")
        (node,) = (each for each in audited.nodes.values() if each.name == "padded")
        return removals.verdict, node.detail

    verdict, detail = found()
    assert (verdict, detail[:22]) == ("claimed", "Its bytes were dropped")
    log.append(copy.store, "dropped", padded.relative_to(copy.store).as_posix(), "", "padded = 0")
    verdict, detail = found()
    assert (verdict, detail[:27]) == ("proven", "Retention dropped its bytes")


def test_an_edited_padding_map_and_a_rewritten_manifest_are_found(chained: Chained, tmp_path: Path) -> None:
    """No digest covers ``result``, but undoing the padding and the store's log do."""
    copy = chained.copy(tmp_path / "copy")
    manifest = copy.output("padded") / "manifest.json"
    edited = json.loads(manifest.read_bytes())
    edited["result"]["padding"]["sizes"][0]["layout"] = "append"
    manifest.write_text(json.dumps(edited))
    assert [fault.split(":")[0] for fault in copy.audit().faults] == ["padding_map_of_padded", "manifests_are_logged"]


def test_a_log_that_was_changed_cut_off_or_written_anew_is_found(chained: Chained, tmp_path: Path) -> None:
    copy = chained.copy(tmp_path / "copy")
    lines = (copy.store / log.LOG).read_bytes().splitlines(keepends=True)
    for changed in (lines[1:], lines[:1], [lines[0].replace(b"finished", b"finishee"), *lines[1:]], [b"{}\n"]):
        (copy.store / log.LOG).write_bytes(b"".join(changed))
        assert [fault for fault in copy.audit().faults if fault.startswith("log_is")]
    for name in (log.LOG, log.HEAD):
        (copy.store / name).unlink()
    for stage in ("published", "validated", "quantized", "padded"):
        log.record(copy.store, copy.output(stage), "finished")
    assert [fault.split(":")[0] for fault in copy.audit().faults] == ["log_is_that_of_signing"]


def test_a_recall_reaches_descendants(chained: Chained, tmp_path: Path) -> None:
    copy = chained.copy(tmp_path / "copy")
    source = copy.audit().nodes
    role, digest = next((node.name, node.digest) for node in source.values() if node.path == copy.root / "merged")
    log.append(copy.store, "recalled", digest, "", "no licence")
    assert copy.audit().faults == [f"recalled: {role} {digest}: no licence"]


def test_a_directory_without_a_manifest_is_refused(chained: Chained) -> None:
    with pytest.raises(CheckpointRefused, match=r"has no manifest\.json"):
        chained.audit(chained.root / "merged")
