"""Promotion and retention in Dagster: the checks that a person meets, and what an unfinished run uses."""

import dagster as dg
import pytest

from qwen_pipeline.checkpoint.store.destinations import Artifact
from qwen_pipeline.config import Settings
from qwen_pipeline.defs.operations.release_assets import production_release
from qwen_pipeline.defs.operations.retention_assets import retention
from qwen_pipeline.defs.partitions import FINE_TUNES
from qwen_pipeline.defs.resources import StepRunner, configured_resources
from qwen_pipeline.defs.runs import PARTITION_TAG, uses_of
from qwen_pipeline.lineage.pointers import link_of
from qwen_pipeline.releases.promotion import approve
from qwen_pipeline_tests.chain import Chain
from qwen_pipeline_tests.releases.released import PRODUCT, Released


@pytest.fixture
def released(chain: Chain, validated: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Released:
    return Released(tmp_path_factory.mktemp("released") / "workspace", chain, validated.path)


def materialize(
    asset: dg.AssetsDefinition, settings: Settings, instance: dg.DagsterInstance, partition: str | None = None
) -> dg.ExecuteInProcessResult:
    resources = {**configured_resources(settings), "steps": StepRunner(retry_delays=()).as_resource()}
    return dg.materialize(
        [asset], instance=instance, partition_key=partition, resources=resources, raise_on_error=False
    )


def checks(result: dg.ExecuteInProcessResult) -> dict[str, tuple[bool, str]]:
    return {each.check_name: (each.passed, each.description or "") for each in result.get_asset_check_evaluations()}


def test_the_pointer_waits_for_approval_and_moves_after_it(released: Released) -> None:
    settings = released.settings(release={"approval": "required"})
    release = released.make(settings, 1)
    link = link_of(released.store, PRODUCT, "production")
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(FINE_TUNES.name or "", [PRODUCT])
        waiting = materialize(production_release, settings, instance, PRODUCT)
        assert not waiting.success
        passed, sentence = checks(waiting)["approved"]
        assert not passed
        assert f'qwen-pipeline approve bot --release {release.name} --reason "..."' in sentence
        assert not link.exists()

        approve(settings, PRODUCT, reason="read the report", by="Ada")
        approved = materialize(production_release, settings, instance, PRODUCT)
        assert approved.success
        assert checks(approved)["approved"][1].endswith("read the report")
        assert link.resolve() == release
        (event,) = approved.asset_materializations_for_node("production_release")
        assert (event.metadata["moved"].value, event.metadata["in_production"].value) == (True, release.name)

        worse = released.make(settings, 2, growth=1.5)
        approve(settings, PRODUCT, reason="did not look closely")
        stays = materialize(production_release, settings, instance, PRODUCT)
        assert stays.success  # the check warns; the pointer stays
        assert "Regressed by 50.0%" in checks(stays)["not_worse_than_production"][1]
        assert link.resolve() == release != worse


def test_retention_leaves_alone_what_an_unfinished_run_uses(released: Released) -> None:
    settings = released.settings(store={"keep": {"published": 0, "irreplaceable": False}})
    first, second = released.make(settings, 1), released.make(settings, 2)
    with dg.DagsterInstance.ephemeral() as instance:

        def run(job: str, status: dg.DagsterRunStatus, **tags: str) -> str:
            created = instance.create_run_for_job(dg.job(name=job)(lambda: None), tags=tags, status=status)
            return created.run_id

        started = run("process_fine_tune", dg.DagsterRunStatus.STARTED, **{PARTITION_TAG: f"{PRODUCT}@small"})
        assert uses_of(instance)(PRODUCT) == f"the run {started[:8]} uses it"
        assert not uses_of(instance)("another")
        (event,) = materialize(retention, settings, instance).asset_materializations_for_node("retention")
        assert (event.metadata["dropped"].value, first.exists()) == (0, True)
        instance.report_run_failed(instance.get_run_by_id(started) or pytest.fail("the run is gone"))

        audit = run("audit_lineage", dg.DagsterRunStatus.STARTED)
        assert uses_of(instance)("another") == f"the run {audit[:8]} uses it"
        instance.report_run_canceled(instance.get_run_by_id(audit) or pytest.fail("the run is gone"))
        (event,) = materialize(retention, settings, instance).asset_materializations_for_node("retention")
        assert (event.metadata["dropped"].value, event.metadata["kept"].value) == (1, 1)
        assert (first.exists(), second.exists()) == (False, True)
        assert event.metadata["outputs"].value
