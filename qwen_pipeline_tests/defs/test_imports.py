"""Imports: what was quantized elsewhere arrives in a place of its own and is repaired in a job of its own."""

import shutil
from pathlib import Path

import dagster as dg
import pytest

from qwen_pipeline.defs.build import code_location
from qwen_pipeline.defs.partitions import FINE_TUNES, IMPORTS
from qwen_pipeline.defs.resources import Pipeline
from qwen_pipeline.defs.sensors import fine_tune_inbox, import_inbox
from qwen_pipeline.models.inbox import MARKER
from qwen_pipeline_tests.codes import Packing, write_checkpoint_of_codes
from qwen_pipeline_tests.site import Site


@pytest.fixture
def pipeline(site: Site) -> Pipeline:
    """A site with one import: three groups of 16, which its two ranks cannot share."""
    root = site.settings.imports / "early"
    write_checkpoint_of_codes(root, Packing(method="gptq", group_size=16), width=48)
    (root / MARKER).touch()
    return Pipeline(site.settings, pauses=())


def test_the_sensor_of_imports_asks_for_a_repair_and_the_other_one_for_nothing(pipeline: Pipeline) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        context = dg.build_sensor_context(
            instance, definitions=code_location(pipeline), resources={"pipeline": pipeline}
        )
        asked, other = import_inbox(context), fine_tune_inbox(context)
    assert isinstance(asked, dg.SensorResult)
    assert isinstance(other, dg.SensorResult)
    assert [run.partition_key for run in asked.run_requests or ()] == ["early"]
    assert [request.partitions_def_name for request in asked.dynamic_partitions_requests or ()] == [IMPORTS.name]
    assert not other.run_requests


def test_an_import_is_repaired_and_its_proof_is_in_the_instance(pipeline: Pipeline) -> None:
    job = code_location(pipeline).resolve_job_def("repair_imported")
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(IMPORTS.name or "", ["early"])
        result = job.execute_in_process(instance=instance, partition_key="early")
        assert not instance.get_dynamic_partitions(FINE_TUNES.name or "")
    assert result.success
    assert [step.step_key for step in result.get_step_success_events()] == [
        "imported_checkpoint",
        "repaired_checkpoint",
    ]
    checks = {check.check_name: check.passed for check in result.get_asset_check_evaluations()}
    assert checks["live_weights_identical"]
    assert checks["new_weights_are_zero"]
    artifact = pipeline.store.require_latest("repaired", "early")
    versions = {
        event.materialization.asset_key.to_user_string(): (event.materialization.tags or {})["dagster/data_version"]
        for event in result.get_asset_materialization_events()
    }
    assert versions["repaired_checkpoint"] == artifact.manifest.content_digest
    assert artifact.manifest.derivation.inputs == {"source": versions["imported_checkpoint"]}


def test_full_precision_is_no_import_and_is_told_so(pipeline: Pipeline, site: Site) -> None:
    place: Path = site.settings.imports / "early"
    shutil.rmtree(place)
    shutil.copytree(site.root / "base", place)
    job = code_location(pipeline).resolve_job_def("repair_imported")
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(IMPORTS.name or "", ["early"])
        result = job.execute_in_process(instance=instance, partition_key="early", raise_on_error=False)
    (failure,) = result.get_step_failure_events()
    data = failure.step_failure_data.user_failure_data
    assert data
    assert "not quantized" in (data.description or "")
