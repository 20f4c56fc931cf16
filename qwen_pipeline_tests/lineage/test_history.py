"""Lineage after everything that happens to a store: real runs of a fine-tune that was uploaded twice."""

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from qwen_pipeline.audits import audit_releases, library_of
from qwen_pipeline.checkpoint.manifest import open_manifest
from qwen_pipeline.checkpoint.store import log
from qwen_pipeline.config.loading import settings_from_values
from qwen_pipeline.defs.partitions import FINE_TUNES
from qwen_pipeline.lineage.bom import ml_bom
from qwen_pipeline.lineage.descendants import descendants
from qwen_pipeline.lineage.library import recorded_steps
from qwen_pipeline.lineage.verification.records import read_record
from qwen_pipeline.releases.gates import verdict_stands
from qwen_pipeline.retention.collect import collect
from qwen_pipeline.retention.outputs import open_outputs
from qwen_pipeline.runner.dagster_home import open_instance
from qwen_pipeline.runner.headless import run_fine_tune
from qwen_pipeline_tests.cli.terminal import qwen_pipeline
from qwen_pipeline_tests.site import FINE_TUNE, Site, make_site
from qwen_pipeline_tests.tiny import tiny_qwen2

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Twice:
    """A site whose fine-tune was uploaded, released, overwritten by another upload and released again."""

    site: Site
    older: Path
    newer: Path

    def digest(self, release: Path, role: str) -> str:
        return open_manifest(release).derivation.inputs[role]

    def audit(self, release: Path | str) -> dict[str, Any]:
        ended = qwen_pipeline("audit", release, "--json", env=self.site.environment)
        assert ended.code == (0 if ended.data["sound"] else 1), ended.err
        return ended.data

    def states(self) -> tuple[str, str]:
        """Return the state of the older and of the newer release, as Dagster's asset shows it."""
        found = {each.path: each.state for each in audit_releases(self.site.settings)}
        return found[self.older], found[self.newer]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Twice:
    site = make_site(tmp_path_factory.mktemp("history") / "site")
    with pytest.MonkeyPatch.context() as patch:
        use(site, patch)
        releases: list[Path] = []
        for seed in (1, 2):
            shutil.rmtree(site.inbox.root / FINE_TUNE, ignore_errors=True)
            site.drop(seed=seed)
            outcome = run_fine_tune(site.settings, FINE_TUNE)
            assert outcome.fault is None
            releases.append(outcome.artifacts[-1].path)
    return Twice(site, *releases)


@pytest.fixture
def twice(made: Twice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Twice:
    """Copy the site to another directory, as if its disk had been moved, and use it there."""
    site = Site(shutil.copytree(made.site.root, tmp_path / "site", symlinks=True))
    use(site, monkeypatch)
    at = {each: site.root / each.relative_to(made.site.root) for each in (made.older, made.newer)}
    return Twice(site, at[made.older], at[made.newer])


def use(site: Site, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("DAGSTER_HOME", raising=False)
    for name, value in site.environment.items():
        patch.setenv(name, value)


def nodes(audited: dict[str, Any], state: str) -> set[str]:
    return {node["name"] for node in audited["nodes"] if node["state"] == state}


def finding(audited: dict[str, Any], name: str) -> str:
    (verdict,) = {each["verdict"] for each in audited["findings"] if each["name"] == name}
    return verdict


def test_an_overwritten_fine_tune_leaves_the_earlier_release_sound(twice: Twice) -> None:
    assert twice.states() == ("stale", "verified")
    older, newer = twice.audit(twice.older), twice.audit(twice.newer)
    paths = {node["path"] for node in older["nodes"]} & {
        node["path"] for node in newer["nodes"] if node["name"] != "quantized"
    }
    assert paths == {None, str(twice.site.root / "base"), str(twice.site.root / "calibration.jsonl")}
    assert nodes(older, "claimed") == {"fine_tune", "text"}  # of the text, the digest is that of its tokens
    assert nodes(newer, "claimed") == {"text"}
    assert {node["name"] for node in older["nodes"]} == {node["name"] for node in newer["nodes"]}


def test_the_version_that_was_compared_is_named_and_is_no_ancestor(twice: Twice) -> None:
    compared = twice.digest(twice.older, "quantized")
    assert twice.digest(twice.newer, "quantized") != compared

    def node() -> dict[str, Any]:
        (found,) = (each for each in twice.audit(twice.newer)["nodes"] if each["digest"] == compared)
        return found

    assert (node()["state"], node()["detail"][:27]) == ("proven", "Compared with, not made fro")
    values = twice.site.settings.model_dump()
    keep = {"merged": 1, "padded": 1, "irreplaceable": False}
    settings = settings_from_values({**values, "store": {"keep": keep}})
    dropped = collect(settings, uses=lambda _: "").dropped
    assert {each.stage for each in dropped} == {"merged", "padded"}
    assert twice.states() == ("orphaned", "verified")
    assert nodes(twice.audit(twice.newer), "claimed") == {"text"}

    settings = settings_from_values({**values, "store": {"keep": keep | {"quantized": 1}}})
    assert {each.stage for each in collect(settings, uses=lambda _: "").dropped} == {"quantized"}
    assert twice.states() == ("orphaned", "verified")
    assert node()["detail"] == "Compared with, not made from: retention dropped its bytes."

    shutil.rmtree(twice.site.settings.store_root / "dropped" / "quantized")
    assert twice.states()[1] == "verified"
    assert node()["detail"] == "Compared with, not made from: its bytes are not here."
    assert finding(twice.audit(twice.newer), "removals_are_logged") == "proven"
    shutil.rmtree(twice.older)
    assert finding(twice.audit(twice.newer), "removals_are_logged") == "claimed"


def test_changed_bytes_of_the_version_that_was_compared_are_named(twice: Twice) -> None:
    (root,) = library_of([], twice.site.settings, None).places[twice.digest(twice.older, "quantized")]
    with (root / "config.json").open("a") as file:
        file.write(" ")
    newer = twice.audit(twice.newer)
    (node,) = (each for each in newer["nodes"] if each["path"] == str(root))
    assert node["state"] == "claimed"
    assert "its bytes changed since: config.json has bytes" in node["detail"]
    assert twice.states() == ("tampered", "verified")


def test_a_recall_of_the_earlier_version_leaves_the_one_that_replaces_it(twice: Twice) -> None:
    store, settings = twice.site.settings.store_root, twice.site.settings
    for recalled in (twice.digest(twice.older, "quantized"), fine_tune_of(twice, twice.older)):
        found = descendants(recalled, library_of([], settings, None))
        assert twice.older in {each.path for each in found}
        assert twice.newer not in {each.path for each in found}
        log.append(store, "recalled", recalled, "", "no licence")
        assert twice.states() == ("recalled", "verified")
        assert not verdict_stands(store, twice.older, None).passed
        assert verdict_stands(store, twice.newer, None).passed
    assert twice.audit(twice.newer)["sound"]


def fine_tune_of(twice: Twice, release: Path) -> str:
    (digest,) = {step.inputs["fine_tune"] for step in recorded_steps(release) if step.stage == "merged"}
    return digest


def test_differences_and_the_bom_do_not_take_the_earlier_version_for_an_ancestor(twice: Twice) -> None:
    ended = qwen_pipeline("audit", "diff", twice.older, twice.newer, "--json", env=twice.site.environment)
    differing = {(each["stage"], each["kind"]) for each in ended.data["differences"]}
    assert {("quantized", "tensor"), ("padded", "tensor"), ("merged", "input")} <= differing
    record = read_record(twice.newer)
    report = json.loads((twice.newer / "validation" / "report.json").read_bytes())
    bom = ml_bom(record, recorded_steps(twice.newer), report, {})
    ancestors = {each["properties"][0]["value"] for each in bom["metadata"]["component"]["pedigree"]["ancestors"]}
    assert twice.digest(twice.newer, "quantized") in ancestors
    assert twice.digest(twice.older, "quantized") not in ancestors


def test_a_run_again_and_a_rebuilt_parent_give_the_same_lineage(twice: Twice) -> None:
    before = twice.audit(twice.newer)
    again = run_fine_tune(twice.site.settings, FINE_TUNE)
    assert all(artifact.reused for artifact in again.artifacts)
    assert twice.audit(twice.newer)["nodes"] == before["nodes"]

    made = {artifact.manifest.derivation.stage: artifact.path for artifact in again.artifacts}
    shutil.rmtree(made["merged"])
    shutil.rmtree(made["padded"])
    assert nodes(twice.audit(twice.newer), "dropped") == {"merged", "padded"}
    rebuilt = run_fine_tune(twice.site.settings, FINE_TUNE)
    assert {each.manifest.derivation.stage for each in rebuilt.artifacts if not each.reused} == {"merged", "padded"}
    after = twice.audit(twice.newer)
    assert after["nodes"] == before["nodes"]
    assert finding(after, "manifests_are_logged") == "proven"
    assert finding(after, "dagster_agrees") == "claimed"
    assert twice.states() == ("stale", "verified")


def test_another_base_leaves_earlier_releases_sound_and_gives_a_new_chain(twice: Twice) -> None:
    """The base was rebuilt at the same place: what was made from the earlier one keeps its digest and its name."""
    base = twice.site.root / "base"
    shutil.rmtree(base)
    tiny_qwen2(base, seed=7)
    assert twice.states() == ("stale", "stale")
    assert nodes(twice.audit(twice.newer), "claimed") == {"base", "text"}
    outcome = run_fine_tune(twice.site.settings, FINE_TUNE)
    assert outcome.fault is None, outcome.fault
    third = outcome.artifacts[-1].path
    assert third not in (twice.older, twice.newer)
    assert nodes(twice.audit(third), "claimed") == {"text"}
    assert twice.states() == ("stale", "stale")
    assert {each.path: each.state for each in audit_releases(twice.site.settings)}[third] == "verified"


def test_deleted_partitions_and_uploads_leave_the_lineage(twice: Twice) -> None:
    with open_instance(twice.site.settings) as instance:
        assert instance.get_dynamic_partitions(FINE_TUNES.name or "") == [FINE_TUNE]
        instance.delete_dynamic_partition(FINE_TUNES.name or "", FINE_TUNE)
        instance.wipe_assets([dg.AssetKey("merged_checkpoint"), dg.AssetKey("published_checkpoint")])
    shutil.rmtree(twice.site.inbox.root / FINE_TUNE)
    newer = twice.audit(twice.newer)
    assert newer["sound"]
    assert nodes(newer, "claimed") == {"fine_tune", "text"}
    assert finding(newer, "dagster_agrees") == "claimed"
    assert twice.states() == ("stale", "verified")


def test_a_lost_instance_is_no_loss(twice: Twice) -> None:
    """From the disk alone everything is as before, and a run with a new instance makes nothing again."""
    before, kept = twice.audit(twice.newer), twice.site.settings.dagster_home
    shutil.rmtree(kept)
    after = twice.audit(twice.newer)
    assert after["nodes"] == before["nodes"]
    assert [each for each in before["findings"] if each["name"] != "dagster_agrees"] == after["findings"]
    again = run_fine_tune(twice.site.settings, FINE_TUNE)
    assert again.fault is None
    assert all(artifact.reused for artifact in again.artifacts)
    assert "6 of 6 outputs" in next(
        each["detail"] for each in twice.audit(twice.newer)["findings"] if each["name"] == "dagster_agrees"
    )
    assert twice.states() == ("stale", "verified")


def test_a_store_at_another_place_has_the_same_lineage(made: Twice, twice: Twice) -> None:
    """The site was copied: nothing in a manifest, a link or the log depends on where it lies."""
    there, here = (json.dumps(each.audit(each.newer)) for each in (made, twice))
    assert here.replace(str(twice.site.root), str(made.site.root)) == there
    assert os.fspath(twice.site.root) in here


def test_tokens_that_two_uploads_share_do_not_join_their_lineage(twice: Twice) -> None:
    """The same text gives the same tokens, so one digest has two makers; each upload's padded model has its own."""
    settings = twice.site.settings
    tokens = library_of([], settings, None).places[calibration_of(twice, twice.older)]
    assert len(tokens) == 2
    padded = [open_manifest(each).derivation.inputs["source"] for each in tokens]
    outputs = open_outputs(settings.store_root)
    assert outputs.behind_passed_validations() >= set(padded)
    without_newer = {path: each for path, each in outputs.here.items() if not each.step.compared_with}
    assert len(replace(outputs, here=without_newer).behind_passed_validations() & set(padded)) == 1


def calibration_of(twice: Twice, release: Path) -> str:
    (digest,) = {step.inputs["calibration"] for step in recorded_steps(release) if step.stage == "quantized"}
    return digest
