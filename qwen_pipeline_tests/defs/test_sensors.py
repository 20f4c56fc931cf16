"""The inbox sensor: only complete uploads are run, and each content exactly once."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from qwen_pipeline.defs.arrivals.sensors import ARRIVAL_TAG
from qwen_pipeline.models.inbox import MARKER
from qwen_pipeline_tests.defs.ticks import Daemon
from qwen_pipeline_tests.site import Site


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral


@pytest.fixture
def daemon(site: Site, instance: dg.DagsterInstance) -> Daemon:
    return Daemon(site, instance)


def test_an_empty_inbox_requests_no_run(daemon: Daemon) -> None:
    assert daemon.tick() == []
    assert "Nothing new" in daemon.skip_message


def test_an_upload_that_is_unchanged_for_a_tick_runs_once(site: Site, daemon: Daemon) -> None:
    site.drop()
    assert daemon.tick() == []
    assert "may still be changing" in daemon.skip_message
    assert daemon.ticks(3) == [["poet"], [], []]
    assert daemon.instance.get_dynamic_partitions("fine_tunes") == ["poet"]


def test_an_upload_that_is_marked_complete_runs_immediately(site: Site, daemon: Daemon) -> None:
    (site.drop() / MARKER).touch()
    assert daemon.ticks(2) == [["poet"], []]


def test_an_incomplete_upload_waits_and_the_reason_is_shown(site: Site, daemon: Daemon) -> None:
    weights = site.drop() / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert daemon.ticks(3) == [[], [], []]
    assert "adapter_model.safetensors" in daemon.skip_message
    weights.write_bytes(whole)
    assert daemon.ticks(3) == [[], ["poet"], []]


def test_changed_content_starts_a_new_run_and_equal_content_does_not(site: Site, daemon: Daemon) -> None:
    upload = site.drop()
    assert daemon.ticks(2) == [[], ["poet"]]
    (upload / "adapter_config.json").touch()
    assert daemon.ticks(3) == [[], [], []]
    site.drop(seed=2)
    assert daemon.ticks(3) == [[], ["poet"], []]


def test_a_repeated_tick_neither_loses_nor_repeats_a_run(site: Site, daemon: Daemon) -> None:
    site.drop()
    daemon.tick()
    cursor = daemon.cursor
    assert daemon.tick() == ["poet"]
    daemon.cursor = cursor
    assert daemon.ticks(2) == [[], []]


def test_invalid_names_are_reported_and_do_not_stop_other_uploads(site: Site, daemon: Daemon) -> None:
    site.drop()
    for name in ("a b", "a..b", "--help", "x" * 200):
        (site.inbox.root / name).symlink_to(site.inbox.root / "poet")
    assert daemon.tick() == []
    for name in ("a b", "a..b", "--help", "xxx"):
        assert f"{name}" in daemon.skip_message
    assert daemon.ticks(2) == [["poet"], []]
    assert daemon.instance.get_dynamic_partitions("fine_tunes") == ["poet"]


def test_content_that_was_run_manually_is_not_run_again(site: Site, daemon: Daemon) -> None:
    site.drop()
    arrival = site.inbox.require("poet")
    job = daemon.definitions.resolve_job_def("process_fine_tune")
    daemon.instance.create_run_for_job(
        job, tags={ARRIVAL_TAG: f"poet@{arrival.digest}"}, status=dg.DagsterRunStatus.SUCCESS
    )
    assert daemon.ticks(3) == [[], [], []]


def test_an_upload_that_is_removed_and_restored_runs_as_a_new_one(site: Site, daemon: Daemon, tmp_path: Path) -> None:
    upload = site.drop()
    daemon.tick()
    upload.rename(tmp_path / "poet")
    assert daemon.tick() == []
    (tmp_path / "poet").rename(upload)
    assert daemon.ticks(2) == [[], ["poet"]]
