"""Imports: checkpoints that were quantized elsewhere have a directory, a sensor and a repair job of their own."""

import shutil
from pathlib import Path

import dagster as dg
import pytest

from qwen_pipeline.checkpoint.store.destinations import CheckpointStore
from qwen_pipeline.definitions import code_location
from qwen_pipeline.defs.arrivals.sensors import fine_tune_inbox, import_inbox
from qwen_pipeline.defs.partitions import FINE_TUNES, IMPORTS
from qwen_pipeline.defs.resources import configured_resources
from qwen_pipeline.models.inbox import MARKER
from qwen_pipeline.status import import_statuses
from qwen_pipeline_tests.codes import Packing, write_checkpoint_of_codes
from qwen_pipeline_tests.site import Site


@pytest.fixture(autouse=True)
def imported(site: Site) -> Path:
    """Write one import to the site: three quantization groups of 16, which its two ranks cannot share."""
    root = site.settings.imports / "early"
    write_checkpoint_of_codes(root, Packing(method="gptq", group_size=16), width=48)
    (root / MARKER).touch()
    return root


def test_only_the_sensor_of_imports_requests_a_run(site: Site) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        context = dg.build_sensor_context(
            instance,
            definitions=code_location(site.settings),
            resources=configured_resources(site.settings),
        )
        repair, other = import_inbox(context), fine_tune_inbox(context)
    assert isinstance(repair, dg.SensorResult)
    assert isinstance(other, dg.SensorResult)
    assert [run.partition_key for run in repair.run_requests or ()] == ["early"]
    assert [request.partitions_def_name for request in repair.dynamic_partitions_requests or ()] == [IMPORTS.name]
    assert not other.run_requests


def test_an_import_that_cannot_be_repaired_is_quarantined_and_stops_no_other(site: Site, imported: Path) -> None:
    write_checkpoint_of_codes(site.settings.imports / "narrow", Packing(method="gptq", group_size=16), width=40)
    shutil.copytree(imported, site.settings.imports / "cut")
    weights = next((site.settings.imports / "cut").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    for name in ("narrow", "cut"):
        (site.settings.imports / name / MARKER).touch()
    with dg.DagsterInstance.ephemeral() as instance:
        context = dg.build_sensor_context(
            instance, definitions=code_location(site.settings), resources=configured_resources(site.settings)
        )
        found, other = import_inbox(context), fine_tune_inbox(context)
    assert isinstance(found, dg.SensorResult)
    assert isinstance(other, dg.SensorResult)
    assert [run.partition_key for run in found.run_requests or ()] == ["early"]
    made, check = other.asset_events
    assert isinstance(made, dg.AssetMaterialization)
    assert made.metadata["quarantined"].value == 2
    assert isinstance(check, dg.AssetCheckEvaluation)
    assert "imports/narrow: " in str(check.description)
    assert "imports/cut: " in str(check.description)
    statuses = import_statuses(site.settings)
    assert [(status.name, status.is_quarantined) for status in statuses] == [
        ("cut", True),
        ("narrow", True),
        ("early", False),
    ]
    assert all(status.remark for status in statuses[:2])


def test_an_import_is_repaired_and_its_checks_are_stored(site: Site) -> None:
    job = code_location(site.settings).resolve_job_def("repair_imported")
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
    artifact = CheckpointStore(site.settings.store_root).require_latest("repaired", "early")
    versions = {
        event.materialization.asset_key.to_user_string(): (event.materialization.tags or {})["dagster/data_version"]
        for event in result.get_asset_materialization_events()
    }
    assert versions["repaired_checkpoint"] == artifact.manifest.content_digest
    assert artifact.manifest.derivation.inputs == {"source": versions["imported_checkpoint"]}


def test_an_import_in_full_precision_is_refused(imported: Path, site: Site) -> None:
    shutil.rmtree(imported)
    shutil.copytree(site.root / "base", imported)
    job = code_location(site.settings).resolve_job_def("repair_imported")
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(IMPORTS.name or "", ["early"])
        result = job.execute_in_process(instance=instance, partition_key="early", raise_on_error=False)
    (failure,) = result.get_step_failure_events()
    data = failure.step_failure_data.user_failure_data
    assert data
    assert "not quantized" in (data.description or "")
