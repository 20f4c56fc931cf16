"""A headless run that releases 8-bit floats: no calibration, and no quantizer's environment."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline.audits import audit_releases, library_of
from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.defs.operations.recorded_runs import recorded_findings
from qwen_pipeline.defs.partitions import FINE_TUNES
from qwen_pipeline.lineage.descendants import descendants
from qwen_pipeline.reports import CheckReport
from qwen_pipeline.runner.dagster_home import open_instance
from qwen_pipeline.runner.headless import Outcome, run_fine_tune
from qwen_pipeline.status import status_of
from qwen_pipeline_tests.chain import checks_of
from qwen_pipeline_tests.cli.terminal import qwen_pipeline
from qwen_pipeline_tests.lineage.chained import write_key
from qwen_pipeline_tests.site import FINE_TUNE, Site, make_site

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Floats:
    """A site whose settings name neither calibration text nor any setting of integer codes, and its first run."""

    site: Site
    outcome: Outcome


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Floats]:
    place = make_site(tmp_path_factory.mktemp("floats") / "site")
    write_key(place.root / "release.pem", place.root / "release.pub")
    file = place.root / "qwen_pipeline.toml"
    settings = file.read_text().replace("group_size = 32\n", 'method = "fp8-dynamic"\n')
    file.write_text(settings.replace('calibration = "calibration.jsonl"\n', ""))
    place.configure('\n[signing]\nkey = "release.pem"\n')
    (place.root / "calibration.jsonl").unlink()
    place.drop()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DAGSTER_HOME", raising=False)
        patch.setattr("qwen_pipeline.workers.environments.ENVIRONMENTS_ROOT", place.root / "none")
        for name, value in place.environment.items():
            patch.setenv(name, value)
        yield Floats(place, run_fine_tune(place.settings, FINE_TUNE))


def test_a_fine_tune_is_released_without_calibration(floats: Floats) -> None:
    site, outcome = floats.site, floats.outcome
    assert outcome.fault is None, outcome.fault
    stages = [artifact.manifest.derivation.stage for artifact in outcome.artifacts]
    assert stages == ["merged", "padded", "quantized", "validated", "published"]
    found = status_of(site.settings, FINE_TUNE, site.inbox.require(FINE_TUNE)).stages
    assert {stage: status.state for stage, status in found.items()} == dict.fromkeys(stages, "done")
    validation, release = outcome.artifacts[-2:]
    checks = checks_of(validation)
    assert_passed(checks, "structure", "loads_in_transformers", "padding_is_silent", "kl_divergence", "tensor_parallel",
                  "ranks_agree")  # fmt: skip
    assert isinstance(kl := checks["kl_divergence"].measured, float)
    assert kl < 0.02
    card = (release.path / "README.md").read_text()
    assert "FP8, fp8-dynamic" in card
    assert "pip install transformers accelerate compressed-tensors" in card
    assert "rounded to 8 bits too" in (validation.path / "report.md").read_text()
    settings = open_checkpoint(release.path).config["quantization_config"]
    assert settings["format"] == "float-quantized"


def test_lineage_stays_right_when_a_fine_tune_is_overwritten_and_the_instance_lost(floats: Floats) -> None:
    site, settings, (*_, first) = floats.site, floats.site.settings, floats.outcome.artifacts
    adapter = floats.outcome.artifacts[0].manifest.derivation.inputs["fine_tune"]
    assert audited(site) == {first.path: "verified"}
    again = run_fine_tune(settings, FINE_TUNE)
    assert all(artifact.reused for artifact in again.artifacts)

    site.drop(seed=2)  # the fine-tune is overwritten: the release is stale, and still what it was
    assert audited(site) == {first.path: "stale"}
    (*_, second) = run_fine_tune(settings, FINE_TUNE).artifacts
    assert audited(site) == {first.path: "stale", second.path: "verified"}
    library = library_of([], settings, None)
    assert {each.path for each in descendants(adapter, library) if each.stage == "published"} == {first.path}
    base = floats.outcome.artifacts[0].manifest.derivation.inputs["base"]
    assert {each.path for each in descendants(base, library) if each.stage == "published"} == {first.path, second.path}

    with open_instance(settings) as instance:  # the partition is deleted
        instance.delete_dynamic_partition(FINE_TUNES.name or "", FINE_TUNE)
    assert audited(site)[second.path] == "verified"
    shutil.rmtree(settings.dagster_home)  # the instance is lost: everything is proven from disk alone
    assert audited(site) == {first.path: "stale", second.path: "verified"}
    assert all(artifact.reused for artifact in run_fine_tune(settings, FINE_TUNE).artifacts)
    said = dagster_agrees(site, second.path)
    assert said.startswith("4 of 4 outputs"), "the first release, which it was compared with, is not among them"


def audited(site: Site) -> dict[Path, str]:
    """Return the state of each release, in the audit that Dagster runs."""
    settings = site.settings
    with open_instance(settings) as instance:
        found = audit_releases(settings, witness=lambda audit: recorded_findings(audit, settings.store_root, instance))
    assert not [release.faults for release in found if release.faults]
    return {release.path: release.state for release in found}


def audit_of(site: Site, release: Path) -> Any:
    found = qwen_pipeline("audit", release, "--key", site.root / "release.pub", "--json")
    assert found.code == 0, found.err
    return found.data


def dagster_agrees(site: Site, release: Path) -> str:
    findings = audit_of(site, release)["findings"]
    return next(each["detail"] for each in findings if each["name"] == "dagster_agrees")


def assert_passed(checks: dict[str, CheckReport], *names: str) -> None:
    for name in names:
        assert checks[name].outcome == "passed", checks[name].detail
