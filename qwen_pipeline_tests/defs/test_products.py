"""Several bases and recipes in one code location: sensor, partitions, runs up to the padded checkpoint, quarantine."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from qwen_pipeline.checkpoint.store.destinations import CheckpointStore
from qwen_pipeline.definitions import code_location
from qwen_pipeline.defs.arrivals.inbox_asset import NOTHING_QUARANTINED
from qwen_pipeline.defs.arrivals.sensors import ARRIVAL_TAG
from qwen_pipeline.defs.resources import StepRunner
from qwen_pipeline.status import fine_tune_statuses
from qwen_pipeline_tests.defs.ticks import Daemon
from qwen_pipeline_tests.several import ADAPTER_CONFIG, change, drop, make_several
from qwen_pipeline_tests.site import Site

SELECTION = [dg.AssetKey(name) for name in ("base_model", "fine_tune", "merged_checkpoint", "padded_checkpoint")]


@pytest.fixture(scope="module")
def place_of_module(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return make_several(tmp_path_factory.mktemp("several") / "site")


@pytest.fixture
def site(place_of_module: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    for name, value in place_of_module.environment.items():
        monkeypatch.setenv(name, value)
    yield place_of_module
    shutil.rmtree(place_of_module.root / "workspace", ignore_errors=True)


@pytest.fixture
def daemon(site: Site) -> Iterator[Daemon]:
    site.inbox.root.mkdir(parents=True)
    with dg.DagsterInstance.ephemeral() as instance:
        yield Daemon(site, instance)


def partitions(daemon: Daemon) -> set[str]:
    return set(daemon.instance.get_dynamic_partitions("fine_tunes"))


def run(daemon: Daemon, key: str, config: dict[str, object] | None = None) -> dg.ExecuteInProcessResult:
    """Materialize the assets up to the padded checkpoint of one partition."""
    return daemon.definitions.resolve_job_def("process_fine_tune").execute_in_process(
        instance=daemon.instance,
        partition_key=key,
        asset_selection=SELECTION,
        run_config={"resources": {"settings": {"config": config}}} if config else None,
    )


def padding(site: Site, key: str) -> tuple[int, str]:
    """Return ranks and layout of the last padded checkpoint of a product."""
    spec = CheckpointStore(site.settings.store_root).require_latest("padded", key).manifest.derivation.spec
    return spec["tensor_parallel"], spec["layout"]


def test_every_product_gets_a_partition_and_one_run_and_runs_with_its_base_and_recipe(
    site: Site, daemon: Daemon
) -> None:
    drop(site, "poet")
    drop(site, "both-large", "other")
    assert daemon.ticks(2) == [["both-large@wide", "both-large@floats", "poet"], []]
    assert partitions(daemon) == {"both-large@wide", "both-large@floats", "poet"}

    override: dict[str, object] = {"padding": {"layout": "append"}}
    results = [run(daemon, "poet"), run(daemon, "both-large@floats"), run(daemon, "both-large@wide", override)]
    merged = site.root / "workspace" / "store" / "merged" / "both-large"
    assert len([path for path in merged.iterdir() if path.is_dir() and not path.is_symlink()]) == 1
    assert padding(site, "poet") == padding(site, "both-large@floats") == (2, "split")
    assert padding(site, "both-large@wide") == (3, "append")

    versions = [
        {
            event.materialization.asset_key.to_user_string(): event.materialization
            for event in result.get_asset_materialization_events()
        }["base_model"]
        for result in results
    ]
    table = versions[1].metadata["bases"]
    assert isinstance(table, dg.TableMetadataValue)
    digests = {str(row.data["base"]): str(row.data["content_digest"]) for row in table.records}
    assert all(digest.startswith("sha256:") for digest in digests.values())
    assert [str(each.metadata["base_of_this_run"].value) for each in versions] == ["small", "large", "large"]
    versions_of_data = [(each.tags or {})["dagster/data_version"] for each in versions]
    assert versions_of_data[1] == versions_of_data[2] != versions_of_data[0]
    base = CheckpointStore(site.settings.store_root).require_latest("merged", "both-large@wide").manifest
    assert base.derivation.inputs["base"] == digests["large"]
    assert {status.name: status.base for status in fine_tune_statuses(site.settings)} == {
        "poet": "small",
        "both-large@wide": "large",
        "both-large@floats": "large",
    }


def test_what_cannot_be_taken_is_quarantined_in_the_ui_and_taken_when_it_changes(site: Site, daemon: Daemon) -> None:
    drop(site, "poet")
    lost = drop(site, "lost", base_model_name_or_path="Qwen/Lost")
    broken = drop(site, "chat-broken")
    change(broken, ADAPTER_CONFIG, r="four")
    assert daemon.tick() == ["poet"]
    materialization, evaluation = daemon.events
    assert isinstance(materialization, dg.AssetMaterialization)
    assert isinstance(evaluation, dg.AssetCheckEvaluation)
    assert not evaluation.passed
    assert evaluation.severity is dg.AssetCheckSeverity.WARN
    table = materialization.metadata["quarantine"]
    assert isinstance(table, dg.TableMetadataValue)
    reasons = {str(row.data["fine_tune"]): str(row.data["reason"]) for row in table.records}
    assert reasons.keys() == {"lost", "chat-broken"}
    assert "Qwen/Lost" in reasons["lost"]
    assert (daemon.tick(), daemon.events) == ([], [])
    first = fine_tune_statuses(site.settings)[0]
    assert (first.name, first.is_quarantined, first.urgency) == ("chat-broken", True, 0)

    result = dg.materialize(
        [code_location(site.settings).get_assets_def("inbox")],
        instance=daemon.instance,
        resources={**daemon.resources, "steps": StepRunner().as_resource()},
    )
    (check,) = result.get_asset_check_evaluations()
    assert (check.check_name, check.passed) == (NOTHING_QUARANTINED.name, False)

    change(lost, ADAPTER_CONFIG, base_model_name_or_path="base")
    shutil.rmtree(broken)
    assert daemon.tick() == ["lost"]
    assert [event.passed for event in daemon.events if isinstance(event, dg.AssetCheckEvaluation)] == [True]


def test_a_tick_without_a_change_reads_no_upload(site: Site, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    drop(site, "poet")
    drop(site, "lost", base_model_name_or_path="Qwen/Lost")
    assert daemon.tick() == ["poet"]

    def read(*_: object) -> None:
        raise AssertionError("an upload was read")

    for place in ("qwen_pipeline.intake.record.place", "qwen_pipeline.models.inbox.directory_digest"):
        monkeypatch.setattr(place, read)
    monkeypatch.setattr("qwen_pipeline.models.inbox.recognize", read)
    assert (daemon.tick(), daemon.events) == ([], [])
    assert "Qwen/Lost" in daemon.skip_message


def test_a_setting_that_changes_places_known_uploads_again(site: Site, daemon: Daemon) -> None:
    drop(site, "poet")
    drop(site, "lost", base_model_name_or_path="Qwen/Lost")
    assert daemon.ticks(2) == [["poet"], []]
    text = (site.root / "qwen_pipeline.toml").read_text()
    changed = text.replace('names = ["lab/small-*"]', 'names = ["Qwen/Lost"]').replace('"*-floats"', '"*-floats", "p*"')
    (site.root / "qwen_pipeline.toml").write_text(changed.replace('base = "large"\n', ""))
    try:
        later = Daemon(site, daemon.instance)
        later.cursor, later.run_keys = daemon.cursor, daemon.run_keys
        assert later.ticks(2) == [["lost", "poet@floats"], []]
    finally:
        (site.root / "qwen_pipeline.toml").write_text(text)


def test_an_upload_that_is_removed_loses_its_partitions_and_its_queued_runs(
    site: Site, daemon: Daemon, tmp_path: Path
) -> None:
    upload = drop(site, "both-large", "other")
    drop(site, "poet")
    assert len(daemon.tick()) == 3
    job = daemon.definitions.resolve_job_def("process_fine_tune")
    digest = site.inbox.find("both-large").identity
    tags = {"dagster/partition": "both-large@wide", ARRIVAL_TAG: f"both-large@wide@{digest}"}
    queued = daemon.instance.create_run_for_job(job, tags=tags, status=dg.DagsterRunStatus.NOT_STARTED)

    inbox = site.inbox.root
    inbox.rename(tmp_path / "unmounted")
    assert daemon.tick() == []
    assert "not mounted" in daemon.skip_message
    assert len(partitions(daemon)) == 3
    (tmp_path / "unmounted").rename(inbox)
    assert daemon.tick() == []

    shutil.move(upload, tmp_path / "both-large")
    assert daemon.tick() == []
    assert partitions(daemon) == {"poet"}
    ended = daemon.instance.get_run_by_id(queued.run_id)
    assert ended
    assert ended.status is dg.DagsterRunStatus.CANCELED

    shutil.move(tmp_path / "both-large", upload)
    assert daemon.tick() == ["both-large@wide"]
    assert partitions(daemon) == {"poet", "both-large@wide", "both-large@floats"}
