"""Admission: priorities, and the disk that unfinished runs will still write."""

import shutil
from collections.abc import Iterator
from typing import NamedTuple

import dagster as dg
import pytest

from qwen_pipeline.checkpoint.store.destinations import CheckpointStore
from qwen_pipeline.defs.arrivals import admission
from qwen_pipeline.defs.arrivals.admission import PRIORITY_TAG, Admission
from qwen_pipeline.defs.partitions import product_tags
from qwen_pipeline.intake.outlay import Outlays, written_bytes
from qwen_pipeline.stages import merge, pad
from qwen_pipeline_tests.defs.ticks import Daemon
from qwen_pipeline_tests.several import drop, make_several
from qwen_pipeline_tests.site import Site


class Usage(NamedTuple):
    free: int
    total: int


@pytest.fixture(scope="module")
def place_of_module(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return make_several(tmp_path_factory.mktemp("several") / "site")


@pytest.fixture
def site(place_of_module: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    settings = (place_of_module.root / "qwen_pipeline.toml").read_text()
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    for name, value in place_of_module.environment.items():
        monkeypatch.setenv(name, value)
    place_of_module.inbox.root.mkdir(parents=True)
    yield place_of_module
    shutil.rmtree(place_of_module.root / "workspace")
    (place_of_module.root / "qwen_pipeline.toml").write_text(settings)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral


def free(monkeypatch: pytest.MonkeyPatch, nbytes: int, total: int = 10**12) -> None:
    monkeypatch.setattr(admission.shutil, "disk_usage", lambda _: Usage(nbytes, total))


def test_an_outlay_is_what_the_stages_write(site: Site) -> None:
    upload = drop(site, "poet")
    outlay = Outlays(site.settings).of("poet")
    slot = CheckpointStore(site.settings.store_root).slot("poet")
    merged = merge.merge(base=site.root / "base", fine_tune=upload, destination=slot)
    padded = pad.pad(source=merged.path, destination=slot, spec=site.settings.padding_spec)
    both = sum(each.manifest.contents.nbytes for each in (merged, padded))
    assert outlay.read_bytes == pytest.approx(merged.manifest.contents.nbytes, rel=0.1)
    assert both * 0.9 < outlay.disk_bytes < both * 3
    assert written_bytes(site.settings.store_root, "poet", since=0) >= both
    assert written_bytes(site.settings.store_root, "poet", since=merged.path.stat().st_ctime + 60) == 0
    assert Outlays(site.settings).of("poet@unknown").disk_bytes == 0


def test_a_run_waits_for_the_disk_that_unfinished_runs_will_still_write(
    site: Site, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = Daemon(site, instance)
    names = ["poet", "prose", "verse"]
    for name in names:
        drop(site, name)
    need = Outlays(site.settings).of("poet").disk_bytes
    assert need
    free(monkeypatch, 2 * need + 1)
    assert daemon.tick() == ["poet", "prose"]
    assert "it needs" in daemon.skip_message or daemon.skip_message == ""
    for name in ("poet", "prose"):
        tags = {"dagster/partition": name, **product_tags(name)}
        instance.create_run_for_job(
            daemon.definitions.resolve_job_def("process_fine_tune"), tags=tags, status=dg.DagsterRunStatus.STARTED
        )
    assert daemon.tick() == []
    assert "verse: it needs" in daemon.skip_message
    free(monkeypatch, 3 * need)
    assert daemon.ticks(2) == [["verse"], []]


def test_retention_is_asked_for_space_once_after_each_run(
    site: Site, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 0)
    drop(site, "poet")
    kept = Admission(site.settings, instance)
    assert kept.refuse("poet")
    assert kept.retention_requests() == []
    site.configure("\n[store.keep]\nmerged = 0\n")
    (request,) = list(Daemon(site, instance).evaluate().run_requests or [])
    assert (request.job_name, request.run_key, request.partition_key) == ("collect_garbage", "space@0", None)
    site.configure("\n[queue]\nreserve_disk = false\n")
    assert Daemon(site, instance).tick() == ["poet"]


def test_higher_priorities_and_smaller_models_come_first(
    site: Site, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, base in (("both-large", "other"), ("poet", "base"), ("urgent", "base")):
        drop(site, name, base)
    site.configure('\n[queue]\npriority = { "urgent*" = 7 }\n')
    monkeypatch.setenv("QWEN_PIPELINE_RECIPES__FLOATS__PRIORITY", "-2")

    def priorities() -> dict[str, str | None]:
        requests = Daemon(site, instance).evaluate().run_requests or ()
        return {str(each.partition_key): each.tags.get(PRIORITY_TAG) for each in requests}

    assert priorities() == {"both-large@wide": None, "both-large@floats": "-2", "poet": None, "urgent": "7"}
    monkeypatch.setenv("QWEN_PIPELINE_QUEUE__SMALL_FIRST", "true")
    monkeypatch.setattr(admission, "_UNIT", 1000)
    found = {key: int(value or 0) for key, value in priorities().items()}
    assert sorted(found, key=lambda key: -found[key]) == ["urgent", "poet", "both-large@wide", "both-large@floats"]


def test_a_small_model_passes_a_large_one_only_if_it_may(
    site: Site, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop(site, "a-large-floats", "other")
    drop(site, "poet")
    need = Outlays(site.settings).of("poet").disk_bytes
    assert Outlays(site.settings).of("a-large-floats@floats").disk_bytes > need
    free(monkeypatch, need)
    assert Daemon(site, instance).tick() == []
    free(monkeypatch, need, total=need)
    assert Daemon(site, instance).tick() == ["poet"]  # the large one is larger than the disk
    free(monkeypatch, need)
    monkeypatch.setenv("QWEN_PIPELINE_QUEUE__SMALL_FIRST", "true")
    assert Daemon(site, instance).tick() == ["poet"]
