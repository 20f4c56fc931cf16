"""The nightly schedule: it runs the fine-tunes that need work and have no unfinished run."""

import dagster as dg
import pytest

from qwen_pipeline.definitions import code_location
from qwen_pipeline.runner.dagster_home import open_instance
from qwen_pipeline_tests.defs.ticks import nightly_requests
from qwen_pipeline_tests.site import Site


def test_a_fine_tune_without_a_release_is_run_once_per_night(site: Site) -> None:
    site.drop("poet")
    site.drop("unknown-to-the-sensor")
    (site.drop("broken") / "adapter_config.json").unlink()
    with open_instance(site.settings) as instance:
        instance.add_dynamic_partitions("fine_tunes", ["poet", "broken", "removed"])
        assert nightly_requests(site, instance) == [("poet", "poet@2026-11-24")]


@pytest.mark.parametrize(("status", "waits"), [("STARTED", True), ("FAILURE", False)])
def test_a_fine_tune_with_an_unfinished_run_is_not_run_again(site: Site, status: str, waits: bool) -> None:
    site.drop()
    job = code_location(site.settings).resolve_job_def("process_fine_tune")
    with open_instance(site.settings) as instance:
        instance.add_dynamic_partitions("fine_tunes", ["poet"])
        tags = {"dagster/partition": "poet"}
        instance.create_run_for_job(job, tags=tags, status=dg.DagsterRunStatus(status))
        assert (nightly_requests(site, instance) == []) == waits
