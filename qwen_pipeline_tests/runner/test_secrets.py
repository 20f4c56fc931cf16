"""Secrets in the environment of a run stay there: no file and no record of the run holds them."""

from pathlib import Path

import dagster as dg
import pytest

from qwen_pipeline.runner.dagster_home import open_instance
from qwen_pipeline.runner.headless import materialize
from qwen_pipeline_tests.defs.conftest import site
from qwen_pipeline_tests.site import FINE_TUNE, Site

__all__ = ["site"]

SECRETS = {
    "HF_TOKEN": "hf_planted4Gk2QmZ",
    "QWEN_PIPELINE_KEY_PASSPHRASE": "planted-passphrase-7h3Xw",
    "SLACK_TOKEN": "xoxb-planted-9Lr5Tn",
    "DAGSTER_PG_PASSWORD": "planted-password-2Vb8Yc",
}
ON_RAY = {"QWEN_PIPELINE_EXECUTION__KIND": "ray", "QWEN_PIPELINE_QUANTIZATION__DEVICE": "cpu"}
"""Settings of steps elsewhere, which a run in this process does not follow: it needs neither cluster nor library."""
NOTIFY = '\n[notify]\nurls = ["slack://${SLACK_TOKEN}/#releases"]\n'


def test_no_planted_secret_is_stored(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SECRETS, **ON_RAY}.items():
        monkeypatch.setenv(name, value)
    site.configure(NOTIFY)
    site.drop()
    outcome = materialize(
        site.settings, FINE_TUNE, only=["base_model", "fine_tune", "merged_checkpoint", "padded_checkpoint"]
    )
    assert outcome.fault is None, outcome.fault
    with open_instance(site.settings) as instance:
        (run,) = instance.get_runs()
        entries = instance.all_logs(run.run_id)
        snapshot = instance.get_job_snapshot(run.job_snapshot_id or "")  # compressed in the database
        recorded = "\n".join([dg.serialize_value(run), dg.serialize_value(snapshot), *map(dg.serialize_value, entries)])
    assert "SLACK_TOKEN" not in recorded, "notifications are no part of a run's config"
    assert len(entries) > 20
    files = [path for path in site.root.rglob("*") if path.is_file()]
    assert {"manifest.json", "model.safetensors", "dagster.yaml"} <= {path.name for path in files}
    assert any(path.suffix == ".db" for path in files)
    for value in SECRETS.values():
        assert value not in recorded
        assert [path for path in files if _holds(path, value)] == []


def _holds(path: Path, value: str) -> bool:
    return value.encode() in path.read_bytes()
