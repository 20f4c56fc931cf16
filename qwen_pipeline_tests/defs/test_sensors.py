"""Arrivals: complete uploads only, and exactly one run for each content."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from qwen_pipeline.defs.build import code_location
from qwen_pipeline.defs.resources import Pipeline
from qwen_pipeline.defs.sensors import ARRIVAL_TAG, fine_tune_inbox
from qwen_pipeline.models.inbox import MARKER
from qwen_pipeline_tests.site import Site


class Daemon:
    """Ticks the sensor as Dagster's daemon does: it keeps the cursor, adds partitions and drops known run keys."""

    def __init__(self, site: Site, instance: dg.DagsterInstance) -> None:
        self.pipeline, self.instance = Pipeline(site.settings), instance
        self.definitions = code_location(self.pipeline)
        self.cursor: str | None = None
        self.run_keys: set[str] = set()
        self.skipped = ""

    def tick(self) -> list[str]:
        """Return the partitions that this tick starts a run of."""
        context = dg.build_sensor_context(
            self.instance, self.cursor, definitions=self.definitions, resources={"pipeline": self.pipeline}
        )
        result = fine_tune_inbox(context)
        assert isinstance(result, dg.SensorResult)
        self.cursor = result.cursor
        self.skipped = str(result.skip_reason.skip_message) if result.skip_reason else ""
        for request in result.dynamic_partitions_requests or ():
            self.instance.add_dynamic_partitions(request.partitions_def_name, list(request.partition_keys))
        started = [run for run in result.run_requests or () if run.run_key not in self.run_keys]
        self.run_keys |= {str(run.run_key) for run in started}
        return [str(run.partition_key) for run in started]

    def ticks(self, count: int) -> list[list[str]]:
        return [self.tick() for _ in range(count)]


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral


@pytest.fixture
def daemon(site: Site, instance: dg.DagsterInstance) -> Daemon:
    return Daemon(site, instance)


def test_an_empty_inbox_is_no_news(daemon: Daemon) -> None:
    assert daemon.tick() == []
    assert "Nothing new" in daemon.skipped


def test_an_upload_that_holds_still_for_a_tick_runs_once(site: Site, daemon: Daemon) -> None:
    site.drop()
    assert daemon.tick() == []
    assert "may still be changing" in daemon.skipped
    assert daemon.ticks(3) == [["poet"], [], []]
    assert daemon.instance.get_dynamic_partitions("fine_tunes") == ["poet"]


def test_a_marked_upload_runs_at_once(site: Site, daemon: Daemon) -> None:
    (site.drop() / MARKER).touch()
    assert daemon.ticks(2) == [["poet"], []]


def test_a_half_written_upload_waits_with_its_reason(site: Site, daemon: Daemon) -> None:
    weights = site.drop() / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert daemon.ticks(3) == [[], [], []]
    assert "adapter_model.safetensors" in daemon.skipped
    weights.write_bytes(whole)
    assert daemon.ticks(3) == [[], ["poet"], []]


def test_new_content_is_a_new_run_and_equal_content_is_not(site: Site, daemon: Daemon) -> None:
    upload = site.drop()
    assert daemon.ticks(2) == [[], ["poet"]]
    (upload / "adapter_config.json").touch()
    assert daemon.ticks(3) == [[], [], []]
    site.drop(seed=2)
    assert daemon.ticks(3) == [[], ["poet"], []]


def test_a_tick_that_is_lost_loses_nothing_and_repeats_nothing(site: Site, daemon: Daemon) -> None:
    site.drop()
    daemon.tick()
    cursor = daemon.cursor
    assert daemon.tick() == ["poet"]
    daemon.cursor = cursor
    assert daemon.ticks(2) == [[], []]


def test_hostile_names_are_skipped_visibly_and_do_not_stop_the_others(site: Site, daemon: Daemon) -> None:
    site.drop()
    for name in ("a b", "a..b", "--help", "x" * 200):
        (site.inbox.root / name).symlink_to(site.inbox.root / "poet")
    assert daemon.tick() == []
    for name in ("a b", "a..b", "--help", "xxx"):
        assert f"{name}" in daemon.skipped
    assert daemon.ticks(2) == [["poet"], []]
    assert daemon.instance.get_dynamic_partitions("fine_tunes") == ["poet"]


def test_content_that_was_run_by_hand_is_not_run_again(site: Site, daemon: Daemon) -> None:
    site.drop()
    arrival = site.inbox.require("poet")
    job = daemon.definitions.resolve_job_def("process_fine_tune")
    daemon.instance.create_run_for_job(
        job, tags={ARRIVAL_TAG: f"poet@{arrival.digest}"}, status=dg.DagsterRunStatus.SUCCESS
    )
    assert daemon.ticks(3) == [[], [], []]


def test_an_upload_that_vanishes_is_forgotten(site: Site, daemon: Daemon, tmp_path: Path) -> None:
    upload = site.drop()
    daemon.tick()
    upload.rename(tmp_path / "poet")
    assert daemon.tick() == []
    (tmp_path / "poet").rename(upload)
    assert daemon.ticks(2) == [[], ["poet"]]
