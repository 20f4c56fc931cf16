"""Headless runs: a real LoRA of a tiny model through the whole graph, with the real engine and without a server."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest

from qwen_pipeline.config.notify import Notify
from qwen_pipeline.definitions import code_location
from qwen_pipeline.defs.operations.notification_sensor import notification_sensor
from qwen_pipeline.defs.resources import configured_resources
from qwen_pipeline.defs.stage_assets import FINE_TUNE_GROUP
from qwen_pipeline.errors import CheckFailed
from qwen_pipeline.lineage.pointers import link_of
from qwen_pipeline.progress import Progress
from qwen_pipeline.reports import load_reports
from qwen_pipeline.runner.dagster_home import open_instance
from qwen_pipeline.runner.headless import Outcome, publish_fine_tune, run_fine_tune
from qwen_pipeline.status import STAGES, status_of
from qwen_pipeline_tests.cli.terminal import qwen_pipeline
from qwen_pipeline_tests.defs.ticks import nightly_requests
from qwen_pipeline_tests.site import FINE_TUNE, Site, make_site
from qwen_pipeline_tests.webhook import webhook

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Finished:
    site: Site
    outcome: Outcome
    progress: list[Progress]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """Run the only fine-tune of a site from upload to release."""
    site = make_site(tmp_path_factory.mktemp("headless") / "site")
    site.configure("\n[costs]\nmachine_hour = 3600\n")
    site.drop()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DAGSTER_HOME", raising=False)
        for name, value in site.environment.items():
            patch.setenv(name, value)
        progress: list[Progress] = []
        yield Finished(site, run_fine_tune(site.settings, FINE_TUNE, observe=progress.append), progress)


def states(site: Site) -> dict[str, str]:
    found = status_of(site.settings, FINE_TUNE, site.inbox.require(FINE_TUNE))
    return {stage: stands.state for stage, stands in found.stages.items()}


def test_every_stage_is_done(finished: Finished) -> None:
    outcome = finished.outcome
    assert outcome.fault is None
    assert [artifact.manifest.derivation.stage for artifact in outcome.artifacts] == list(STAGES)
    assert set(states(finished.site).values()) == {"done"}
    assert (outcome.artifacts[-1].path / "README.md").is_file()


def test_the_observer_receives_progress_by_layer(finished: Finished) -> None:
    assert {event.done for event in finished.progress if event.unit == "layers"} >= {1}


def test_every_check_is_stored_with_its_partition(finished: Finished) -> None:
    graph = code_location(finished.site.settings).resolve_asset_graph()
    keys = {key for key in graph.asset_check_keys if graph.get(key.asset_key).group_name == FINE_TUNE_GROUP}
    with open_instance(finished.site.settings) as instance:
        records = instance.event_log_storage.get_latest_asset_check_execution_by_key(list(keys))
    assert records.keys() == keys
    assert {record.partition for record in records.values()} == {FINE_TUNE}


def test_dagster_can_draw_what_every_stage_took_and_measured(finished: Finished) -> None:
    figures: dict[str, dict[str, float]] = {}
    with open_instance(finished.site.settings) as instance:
        for key in instance.all_asset_keys():
            (record,) = instance.fetch_materializations(key, limit=1).records
            assert record.asset_materialization
            figures[key.path[-1].partition("_")[0]] = {
                name: value.value
                for name, value in record.asset_materialization.metadata.items()
                if isinstance(value, (dg.FloatMetadataValue, dg.IntMetadataValue)) and value.value is not None
            }
    for artifact in finished.outcome.artifacts:
        manifest = artifact.manifest
        drawn = figures[manifest.derivation.stage]
        assert drawn["size_mb"] == pytest.approx(manifest.contents.nbytes / 1e6, rel=1e-3)
        assert drawn["cost"] == pytest.approx(manifest.run.seconds, rel=1e-3)
        assert drawn["gpu_seconds"] == 0
    assert 0 < figures["validated"]["kl_divergence"] < 1
    assert 0.5 < figures["validated"]["perplexity_ratio"] < 2
    seconds = sum(artifact.manifest.run.seconds for artifact in finished.outcome.artifacts)
    assert figures["published"]["total_cost"] == pytest.approx(seconds, rel=1e-3)


def test_a_run_is_found_by_what_it_is_about(finished: Finished) -> None:
    with open_instance(finished.site.settings) as instance:
        run = instance.get_run_by_id(finished.outcome.run_id)
    assert run
    assert (
        run.tags.items()
        >= {
            "qwen_pipeline/fine_tune": FINE_TUNE,
            "qwen_pipeline/recipe": "default",
            "qwen_pipeline/stage": "production_release",
        }.items()
    )
    assert "qwen_pipeline/trigger" in run.tags


def test_the_report_with_its_plots_is_in_the_metadata(finished: Finished) -> None:
    with open_instance(finished.site.settings) as instance:
        (record,) = instance.fetch_materializations(dg.AssetKey("validated_checkpoint"), limit=1).records
    assert record.asset_materialization
    report = record.asset_materialization.metadata["report"]
    assert isinstance(report, dg.MarkdownMetadataValue)
    assert "data:image/png;base64," in report.value


def test_the_release_and_its_warnings_are_reported(finished: Finished) -> None:
    with webhook() as hook, open_instance(finished.site.settings) as instance:
        notify = Notify(urls=(f"json://127.0.0.1:{hook.port}/",), min_free_gb=0)
        beginning = json.dumps({"failed": 0, "canceled": 0, "succeeded": 0, "disk_low": False})
        context = dg.build_sensor_context(
            instance,
            beginning,
            definitions=code_location(finished.site.settings),
            resources=configured_resources(finished.site.settings),
        )
        notification_sensor(notify)(context)
    release = finished.outcome.artifacts[-1]
    warned = [
        f"{artifact.manifest.derivation.stage}_checkpoint {check.name}: "
        for artifact in finished.outcome.artifacts
        for check in load_reports(artifact.manifest.result)
        if check.outcome == "warning"
    ]
    posts = {post["title"]: post["message"] for _, post in hook.posts}
    assert f"{release.path}\n{release.manifest.content_digest}" in posts[f"{FINE_TUNE}: released"]
    told = "".join(posts.values())
    assert all(name in told for name in warned)


def test_a_second_run_makes_nothing_new(finished: Finished) -> None:
    again = qwen_pipeline("run", FINE_TUNE, "--json", env=finished.site.environment)
    assert again.code == 0
    assert all(stage["reused"] for stage in again.data["stages"])
    digests = [artifact.manifest.content_digest for artifact in finished.outcome.artifacts]
    assert [stage["content_digest"] for stage in again.data["stages"]] == digests
    assert again.data["release"] == str(finished.outcome.artifacts[-1].path)


def test_a_run_ends_in_production_and_makes_again_what_retention_dropped(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, made = finished.site, {each.manifest.derivation.stage: each for each in finished.outcome.artifacts}
    production = link_of(site.settings.store_root, FINE_TUNE, "production")
    assert production.resolve() == made["published"].path
    for stage in ("merged", "padded", "quantized"):
        monkeypatch.setenv(f"QWEN_PIPELINE_STORE__KEEP__{stage.upper()}", "until validated")
    found = qwen_pipeline("gc", "--json", env=site.environment)
    assert {each["stage"] for each in found.data["dropped"]} == {"merged", "padded", "quantized"}, found.err
    assert [state for state in states(site).values() if state == "done"] == ["done"] * 3
    with open_instance(site.settings) as instance:
        assert nightly_requests(site, instance) == []
    audited = qwen_pipeline("audit", FINE_TUNE, "--json", env=site.environment)
    assert audited.code == 0, audited.err
    assert {each["name"] for each in audited.data["nodes"] if each["state"] == "dropped"} == {
        "merged",
        "padded",
        "quantized",
    }
    again = qwen_pipeline("run", FINE_TUNE, "--json", env=site.environment)
    digests = [artifact.manifest.content_digest for artifact in finished.outcome.artifacts]
    assert [stage["content_digest"] for stage in again.data["stages"]] == digests
    assert set(states(site).values()) == {"done"}


def test_the_nightly_schedule_requests_nothing_until_a_setting_changes(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_instance(finished.site.settings) as instance:
        assert nightly_requests(finished.site, instance) == []
        monkeypatch.setenv("QWEN_PIPELINE_QUANTIZATION__BITS", "8")
        assert states(finished.site)["quantized"] == "stale"
        assert [name for name, _ in nightly_requests(finished.site, instance)] == [FINE_TUNE]


def test_overridden_limits_make_the_validation_of_that_fine_tune_stale(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN_PIPELINE_VALIDATION__OVERRIDES", '{"another": {"max_mean_kl": 0.9}}')
    assert set(states(finished.site).values()) == {"done"}
    monkeypatch.setenv("QWEN_PIPELINE_VALIDATION__OVERRIDES", f'{{"{FINE_TUNE}": {{"max_mean_kl": 0.9}}}}')
    assert {stage for stage, state in states(finished.site).items() if state == "stale"} >= {"validated"}
    assert states(finished.site)["quantized"] == "done"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_with_130_and_leaves_no_worker(finished: Finished, number: int) -> None:
    env = {**os.environ, **finished.site.environment, "QWEN_PIPELINE_QUANTIZATION__SEED": "7"}
    command = [sys.executable, "-m", "qwen_pipeline", "run", FINE_TUNE, "--json"]
    run = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stderr
    assert any(line.startswith("quantize:") for line in run.stderr)
    workers = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    run.send_signal(number)
    out, _ = run.communicate(timeout=60)
    assert run.returncode == json.loads(out)["error"]["exit_code"] == 130
    assert workers
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def test_a_run_killed_in_every_stage_ends_in_the_same_digests(finished: Finished, tmp_path: Path) -> None:
    fresh = {
        **finished.site.environment,
        "QWEN_PIPELINE_WORKSPACE": str(tmp_path),
        "QWEN_PIPELINE_INBOX": str(finished.site.inbox.root),
    }
    command = [sys.executable, "-m", "qwen_pipeline", "run", FINE_TUNE, "--json"]
    env = {**os.environ, **fresh}
    for task in ("merge", "pad", "quantize", "evaluate", "publish quantized"):
        killed = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert killed.stderr
        assert any(line.startswith(f"{task}:") for line in killed.stderr), task
        killed.kill()
        killed.wait()

    again = qwen_pipeline("run", FINE_TUNE, "--json", env=fresh)

    assert again.code == 0
    undisturbed = [artifact.manifest.content_digest for artifact in finished.outcome.artifacts]
    assert [stage["content_digest"] for stage in again.data["stages"]] == undisturbed


def test_the_unpadded_model_is_quantized_and_measured_if_configured(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN_PIPELINE_VALIDATION__UNPADDED", "true")
    outcome = run_fine_tune(finished.site.settings, FINE_TUNE)
    assert outcome.fault is None
    made = {artifact.manifest.derivation.stage: artifact for artifact in outcome.artifacts}
    assert made["quantized"].reused
    assert not made["quantized_unpadded"].reused
    assert "quantized without padding" in (made["validated"].path / "report.md").read_text()


def test_both_merges_of_a_qlora_are_made_and_compared_if_configured(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN_PIPELINE_BASE_NF4", "double")
    monkeypatch.setenv("QWEN_PIPELINE_VALIDATION__OTHER_MERGE", "true")
    monkeypatch.setenv("QWEN_PIPELINE_VALIDATION__LIMITS__MAX_MEAN_KL", "9")
    outcome = run_fine_tune(finished.site.settings, FINE_TUNE)
    assert outcome.fault is None, outcome.fault
    merges = [each for each in outcome.artifacts if each.manifest.derivation.stage == "merged"]
    as_stored = finished.outcome.artifacts[0].path
    assert [each.path for each in merges if each.reused] == [as_stored]
    (rounded,) = (each.path for each in merges if not each.reused)
    assert (as_stored.parent / "latest").resolve() == rounded
    (validated,) = (each for each in outcome.artifacts if each.manifest.derivation.stage == "validated")
    assert validated.manifest.result["findings"]["models"]["merged otherwise"]["divergence"]["mean"] > 0
    with open_instance(finished.site.settings) as instance:
        (record,) = instance.fetch_materializations(dg.AssetKey("validated_checkpoint"), limit=1).records
    assert record.asset_materialization
    report = str(record.asset_materialization.metadata["report"].value)
    assert "onto the base rounded to NF4 as by QLoRA (base_nf4 double)" in report
    assert "merged otherwise" in report


def test_a_failed_limit_stops_every_way_to_a_release(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_PIPELINE_VALIDATION__LIMITS__MAX_MEAN_KL", "0")
    ended = qwen_pipeline("run", FINE_TUNE, "--json")
    assert (ended.code, ended.data["error"]["kind"]) == (1, "CheckFailed")
    assert [stage["stage"] for stage in ended.data["stages"]] == list(STAGES[:-1])
    assert ended.data["release"] is None
    assert states(finished.site)["validated"] == "failed"

    with open_instance(finished.site.settings) as instance:
        stats = instance.get_run_step_stats(ended.data["run_id"])
    assert "published_checkpoint" not in {step.step_key for step in stats}

    by_hand = publish_fine_tune(finished.site.settings, FINE_TUNE)
    assert isinstance(by_hand.fault, CheckFailed)
    assert not by_hand.artifacts
