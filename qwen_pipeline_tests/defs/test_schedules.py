"""The night takes up what the day left, and nothing else."""

from datetime import UTC, datetime

import dagster as dg
import pytest

from qwen_pipeline.defs.build import code_location
from qwen_pipeline.defs.resources import Pipeline
from qwen_pipeline.defs.schedules import nightly
from qwen_pipeline.runner.dagster_home import open_instance
from qwen_pipeline_tests.site import Site


def requested(site: Site, instance: dg.DagsterInstance) -> list[tuple[str | None, str | None]]:
    """Return (partition, run key) of each run that one night asks for."""
    pipeline = Pipeline(site.settings)
    context = dg.build_schedule_context(
        instance,
        datetime(2026, 11, 24, 2, tzinfo=UTC),
        resources={"pipeline": pipeline},
        repository_def=code_location(pipeline).get_repository_def(),
    )
    data = nightly.evaluate_tick(context)
    return [(request.partition_key, request.run_key) for request in data.run_requests or ()]


def test_what_has_no_release_is_run_once_a_night(site: Site) -> None:
    site.drop("poet")
    site.drop("unknown-to-the-sensor")
    (site.drop("broken") / "adapter_config.json").unlink()
    with open_instance(site.settings) as instance:
        instance.add_dynamic_partitions("fine_tunes", ["poet", "broken", "removed"])
        assert requested(site, instance) == [("poet", "poet@2026-11-24")]


@pytest.mark.parametrize(("status", "waits"), [("STARTED", True), ("STARTING", True), ("FAILURE", False)])
def test_what_is_being_worked_on_is_left_alone(site: Site, status: str, waits: bool) -> None:
    site.drop()
    job = code_location(Pipeline(site.settings)).resolve_job_def("process_fine_tune")
    with open_instance(site.settings) as instance:
        instance.add_dynamic_partitions("fine_tunes", ["poet"])
        tags = {"dagster/partition": "poet"}
        instance.create_run_for_job(job, tags=tags, status=dg.DagsterRunStatus(status))
        assert (requested(site, instance) == []) == waits
