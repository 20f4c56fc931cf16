"""The commands ``audit``, ``sign`` and ``verify``, and Dagster's audit of all releases."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest

from qwen_pipeline.audits import audit_releases
from qwen_pipeline.checkpoint.digest import digest_file
from qwen_pipeline.checkpoint.manifest import dump_manifest, open_manifest
from qwen_pipeline.checkpoint.store.canonical import ATTESTATIONS
from qwen_pipeline.config import load_settings
from qwen_pipeline.config.file import FILE_VARIABLE
from qwen_pipeline.config.loading import settings_from_values
from qwen_pipeline.defs.operations.lineage_assets import lineage_audit
from qwen_pipeline.defs.resources import StepRunner, configured_resources
from qwen_pipeline.runner.headless import publish_fine_tune
from qwen_pipeline_tests.cli.terminal import Ended, qwen_pipeline
from qwen_pipeline_tests.lineage.chained import NAME, Chained

SETTINGS = 'base_model = "workspace/merged"\n[signing]\nkey = "workspace/release.pem"\n'


@pytest.fixture
def place(chained: Chained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chained:
    """Copy the chain to where settings find it."""
    copy = chained.copy(tmp_path / "workspace")
    (tmp_path / "settings.toml").write_text(
        'base_model = "workspace/merged"\n[signing]\nkey = "workspace/release.pem"\n'
    )
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "settings.toml"))
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    return copy


def output_digest(root: Path) -> str:
    return json.loads((root / "manifest.json").read_bytes())["content_digest"]


def test_an_audit_by_name_by_path_as_tree_and_as_table(place: Chained) -> None:
    by_name = qwen_pipeline("audit", NAME, "--key", place.public_key)
    assert by_name.code == 0, by_name.err
    assert "published" in by_name.out
    assert "padding_before_quantization" in by_name.out
    table = qwen_pipeline("audit", "show", place.output("quantized"), "--table")
    assert (table.code, "files have the stated" in table.out) == (0, True), table.err
    by_path = qwen_pipeline("audit", place.release, "--json")
    assert by_path.data["sound"]
    states = {node["name"]: node["state"] for node in by_path.data["nodes"]}
    assert states["padded"] == states["quantized"] == "proven"

    with (place.output("padded") / "config.json").open("a") as file:
        file.write(" ")
    changed = qwen_pipeline("audit", NAME)
    assert changed.code == 1
    assert "config.json has bytes" in changed.err.replace("\n", " ")
    assert qwen_pipeline("audit", "absent").code == 2
    for option in ("--source", "--in"):  # a name of the hub is no directory: nothing is downloaded
        refused = qwen_pipeline("audit", NAME, option, "acme/model")
        assert (refused.code, "acme/model is not there" in refused.err) == (2, True)


def test_differences_name_what_changed(place: Chained, tmp_path: Path) -> None:
    assert qwen_pipeline("audit", "diff", NAME, place.release).out.strip() == "No difference."
    other = shutil.copytree(place.output("quantized"), tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_bytes())
    manifest["derivation"]["spec"]["damp_percent"] = 0.5
    (other / "manifest.json").write_text(json.dumps(manifest))
    found: Ended = qwen_pipeline("audit", "diff", place.output("quantized"), other, "--json")
    (difference,) = found.data["differences"]
    assert (difference["kind"], difference["name"], difference["after"]) == ("setting", "damp_percent", 0.5)


def test_descendants_and_a_recall(place: Chained) -> None:
    padded = output_digest(place.output("padded"))
    found = qwen_pipeline("audit", "descendants", padded[:20], "--json").data["descendants"]
    assert {each["stage"] for each in found} == {"quantized", "validated", "published"}
    assert qwen_pipeline("audit", "descendants", "sha256:12").code == 2
    assert qwen_pipeline("audit", "recall", padded, "--reason", "no licence").code == 0
    assert "no licence" in qwen_pipeline("audit", NAME).err
    assert [release.state for release in audit_releases(settings_from_values({"workspace": place.root}))] == [
        "recalled"
    ]


def test_a_release_behind_a_link_is_audited_too(place: Chained, tmp_path: Path) -> None:
    release = place.release
    release.rename(tmp_path / "elsewhere")
    release.symlink_to(tmp_path / "elsewhere")
    settings = settings_from_values({"workspace": place.root})
    assert [(each.path, each.state, list(each.faults)) for each in audit_releases(settings)] == [(release, "stale", [])]
    (release / "manifest.json").write_text((release / "manifest.json").read_text() + " ")
    (audited,) = audit_releases(settings)
    assert (audited.state, len(audited.faults)) == ("tampered", 1)


def test_a_release_is_signed_and_verified(place: Chained) -> None:
    for name in ATTESTATIONS:
        (place.release / name).unlink()
    assert qwen_pipeline("verify", place.release, "--key", place.public_key).code == 1
    signed = qwen_pipeline("sign", NAME, "--json")
    assert (signed.code, signed.data["signed"]) == (0, True), signed.err
    assert "signature already" in " ".join(qwen_pipeline("sign", NAME).out.split())
    verified = qwen_pipeline("verify", place.release, "--key", place.public_key)
    assert (verified.code, "is verified" in " ".join(verified.out.split())) == (0, True), verified.err
    assert qwen_pipeline("sign", NAME, "--key", place.root / "absent.pem").code == 2


def test_an_audit_compares_dagsters_records_and_writes_a_page(place: Chained, tmp_path: Path) -> None:
    assert "dagster_agrees" not in qwen_pipeline("audit", NAME).out  # there is no instance
    assert publish_fine_tune(load_settings(), NAME).fault is None
    finding = verdict_of_dagster(qwen_pipeline("audit", NAME, "--html", tmp_path / "audit.html", "--json"))
    assert finding["verdict"] == "claimed"
    assert "1 of 4 outputs: published by run" in finding["detail"]
    page = (tmp_path / "audit.html").read_text()
    assert "0 contradictions" in page
    assert output_digest(place.output("padded")) in page

    (place.release / "README.md").write_text("another card")
    manifest = open_manifest(place.release)
    files = {**manifest.contents.files, "README.md": digest_file(place.release / "README.md")}
    contents = replace(manifest.contents, files=files)
    sealed = replace(manifest, contents=contents, content_digest=contents.digest)
    (place.release / "manifest.json").write_bytes(dump_manifest(sealed))
    finding = verdict_of_dagster(qwen_pipeline("audit", NAME, "--json"))
    assert finding["verdict"] == "refuted"
    assert "published" in finding["detail"]


def verdict_of_dagster(ended: Ended) -> dict[str, str]:
    (finding,) = (each for each in ended.data["findings"] if each["name"] == "dagster_agrees")
    return finding


def test_dagster_audits_all_releases(place: Chained) -> None:
    settings = settings_from_values({"workspace": place.root, "base_model": str(place.root / "merged")})
    resources = {**configured_resources(settings), "steps": StepRunner(retry_delays=()).as_resource()}
    for damaged, state in ((False, "stale"), (True, "tampered")):  # it was made with other settings
        if damaged:
            (place.output("padded") / "config.json").unlink()
        result = dg.materialize([lineage_audit], resources=resources)
        (check,) = result.get_asset_check_evaluations()
        assert check.passed is not damaged
        metadata = result.asset_materializations_for_node("lineage_audit")[0].metadata
        assert metadata[state].value == 1
        assert "config.json" in (check.description or "") or not damaged
