"""OpenLineage events of a real chain, by the maintained library, to a real server and to a file."""

import json
from pathlib import Path

import pytest

from qwen_pipeline.catalogue import emit_new
from qwen_pipeline.checkpoint.manifest import open_manifest
from qwen_pipeline.config import Settings
from qwen_pipeline.config.file import FILE_VARIABLE
from qwen_pipeline.config.loading import settings_from_values
from qwen_pipeline.definitions import code_location
from qwen_pipeline.errors import EnvironmentFault, InputRefused
from qwen_pipeline.lineage.openlineage import API_KEY_VARIABLE
from qwen_pipeline_tests.cli.terminal import qwen_pipeline
from qwen_pipeline_tests.lineage.chained import NAME, Chained
from qwen_pipeline_tests.webhook import webhook


def settings_of(chained: Chained, **place: object) -> Settings:
    return settings_from_values({"workspace": chained.root, "openlineage": place})


def test_events_reach_a_server_once_and_again_if_it_was_down(
    chained: Chained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = chained.copy(tmp_path / "workspace")
    monkeypatch.setenv(API_KEY_VARIABLE, "k")
    with webhook() as catalogue:
        settings = settings_of(copy, url=f"http://127.0.0.1:{catalogue.port}", namespace="models")
        assert "openlineage" in {sensor.name for sensor in code_location(settings).sensors or ()}
        catalogue.status = 503
        with pytest.raises(EnvironmentFault, match="did not take an OpenLineage event"):
            emit_new(settings)
        catalogue.status = 200
        assert [name.partition("/")[0] for name in emit_new(settings)] == [
            "padded",
            "quantized",
            "validated",
            "published",
        ]
        assert emit_new(settings) == []
    events = [event for path, event in catalogue.posts if path == "/api/v1/lineage"]
    assert [event["eventType"] for event in events] == ["START", "COMPLETE"] * 4
    released = events[-1]
    assert (released["job"]["namespace"], released["job"]["name"]) == ("models", "published")
    assert released["run"]["runId"] == events[-2]["run"]["runId"] != events[0]["run"]["runId"]
    inputs = {each["name"]: each["facets"]["version"]["datasetVersion"] for each in released["inputs"]}
    assert inputs == {
        f"{stage}/{NAME}": open_manifest(copy.output(stage)).content_digest for stage in ("quantized", "validated")
    }
    (output,) = released["outputs"]
    assert output["facets"]["version"]["datasetVersion"] == open_manifest(copy.release).content_digest
    (validated,) = events[-3]["outputs"]
    asserted = {
        each["assertion"]: each["success"] for each in validated["facets"]["dataQualityAssertions"]["assertions"]
    }
    assert asserted["kl_divergence"]
    assert "serves" not in asserted  # it was skipped


def test_nothing_is_sent_unless_it_is_configured(
    chained: Chained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = chained.copy(tmp_path / "workspace")
    off = settings_of(copy)
    assert "openlineage" not in {sensor.name for sensor in code_location(off).sensors or ()}
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "settings.toml"))
    (tmp_path / "settings.toml").write_text('workspace = "workspace"\n')
    assert qwen_pipeline("audit", "emit").code == InputRefused.exit_code
    (tmp_path / "settings.toml").write_text('workspace = "workspace"\n[openlineage]\nfile = "events.jsonl"\n')
    assert "events of 4 outputs" in qwen_pipeline("audit", "emit").out
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").open()]
    assert [event["job"]["name"] for event in events[::2]] == ["padded", "quantized", "validated", "published"]
    with pytest.raises(InputRefused, match="pass one of them"):
        settings_of(copy, url="http://a", file="b")
