"""``qwen-pipeline doctor`` on a sound site, and on ones with a fault each."""

from pathlib import Path

import pytest

from qwen_pipeline_tests.cli.terminal import qwen_pipeline
from qwen_pipeline_tests.several import make_several
from qwen_pipeline_tests.site import Site


@pytest.fixture
def several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    place = make_several(tmp_path / "several")
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)
    return place


def outcomes(findings: list[dict[str, str]]) -> dict[str, str]:
    return {finding["subject"]: finding["outcome"] for finding in findings}


@pytest.mark.engine
def test_a_sound_site_passes_with_warnings_of_what_is_not_running(site: Site) -> None:
    site.drop()
    found = qwen_pipeline("doctor", "--json")
    assert found.code == 0, found.out
    by_outcome = outcomes(found.data["findings"])
    assert {subject for subject, outcome in by_outcome.items() if outcome != "ok"} == {"dagster"}
    assert by_outcome.keys() >= {"machine", "settings", "device", "base_model", "quantizer", "disk", "inbox"}


def test_every_fault_is_found_in_one_go_with_its_remedy(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = site.drop() / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (site.root / "calibration.jsonl").unlink()
    site.configure(
        '\n[engines.gptqmodel]\npython = "gone/bin/python"\n[notify]\nurls = ["slack://${SLACK_TOKEN}/#a"]\n'
        '[signing]\nkey = "none.pem"\n'
    )
    monkeypatch.setenv("DAGSTER_HOME", str(site.root / "nowhere"))
    found = qwen_pipeline("doctor", "--json")
    assert found.code == 1
    by_subject = {finding["subject"]: finding for finding in found.data["findings"]}
    failed = {subject for subject, finding in by_subject.items() if finding["outcome"] == "failed"}
    assert failed == {"calibration", "quantizer", "dagster", "signing", "notifications"}
    assert all(by_subject[subject]["remedy"] for subject in failed)
    assert "SLACK_TOKEN" in by_subject["notifications"]["detail"]
    assert "adapter_model.safetensors" in by_subject["inbox"]["detail"]
    assert found.data["error"]["what"].startswith("5 of 14 would stop a run: ")


def test_each_recipe_and_base_is_looked_at_and_named(several: Site) -> None:
    several.configure('\n[recipes.code]\nmatch = ["*"]\ncalibration = "gone.jsonl"\nbase = "large"\n')
    found = qwen_pipeline("doctor", "--json")
    by_outcome = outcomes(found.data["findings"])
    assert {"base_model (small)", "base_model (large)"} <= by_outcome.keys()
    assert by_outcome["calibration (large@code)"] == "failed"
    assert by_outcome["calibration (small)"] == by_outcome["calibration (large@floats)"] == "ok"
    assert "calibration (large)" not in by_outcome  # as with the other base
    assert not {subject for subject in by_outcome if subject.startswith("inbox (")}


def test_settings_that_do_not_load_are_the_only_finding_beside_the_machine(site: Site) -> None:
    site.configure("\n[padding_]\nlayout = 1\n")
    found = qwen_pipeline("doctor", "--json")
    assert found.code == 1
    assert outcomes(found.data["findings"]) == {"machine": "ok", "settings": "failed"}
    assert "padding" in found.data["findings"][1]["detail"]
    assert "settings" in qwen_pipeline("doctor").out
