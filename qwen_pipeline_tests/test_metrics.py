"""Metrics as Prometheus' own parser reads them."""

from pathlib import Path

import pytest

from qwen_pipeline.checkpoint.store.destinations import CheckpointStore
from qwen_pipeline.metrics import Metric, gather_metrics, prometheus_text
from qwen_pipeline.stages import merge
from qwen_pipeline_tests.cli.terminal import qwen_pipeline
from qwen_pipeline_tests.site import FINE_TUNE, Site, site

pytestmark = pytest.mark.lengthy

__all__ = ["site"]

parser = pytest.importorskip("prometheus_client.parser")


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Return name and values of labels -> value."""
    families = parser.text_string_to_metric_families(text)
    return {
        (sample.name.removeprefix("qwen_pipeline_"), *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_are_those_of_the_manifests(site: Site, tmp_path: Path) -> None:
    slot = CheckpointStore(site.settings.store_root).slot(FINE_TUNE)
    made = merge.merge(base=site.root / "base", fine_tune=site.drop(), destination=slot)
    site.drop("waiting", seed=2)
    site.configure("\n[costs]\nmachine_hour = 7200\ngpu_hour = 1\n")
    file = tmp_path / "pipeline.prom"
    ended = qwen_pipeline("metrics", "--textfile", file, "--json")
    assert ended.code == 0, ended.err
    found = samples(file.read_text())
    assert ended.data["samples"] == len(found)
    assert found["products", "missing"] == 2
    assert found["products", "done"] == 0
    assert found["stage_seconds", FINE_TUNE, "merged"] == made.manifest.run.seconds
    assert found["stage_bytes", FINE_TUNE, "merged"] == made.manifest.contents.nbytes
    assert found["stage_gpu_seconds", FINE_TUNE, "merged"] == 0
    assert found["stage_cost", FINE_TUNE, "merged"] == pytest.approx(2 * made.manifest.run.seconds)
    assert found["disk_free_bytes",] > 0
    assert not any("waiting" in labels for labels in found)
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_labels_are_escaped() -> None:
    name = 'a "quoted" \\ name\nof two lines'
    text = prometheus_text([Metric(name="x", text="About.", samples=[({"name": name}, 1e21)])])
    assert samples(text) == {("x", name): 1e21}


def test_a_file_that_cannot_be_written_is_an_error_of_the_machine(site: Site, tmp_path: Path) -> None:
    ended = qwen_pipeline("metrics", "--textfile", tmp_path / "absent" / "pipeline.prom")
    assert ended.code == 3
    assert "cannot be written: No such file or directory" in ended.err
    assert {metric.name for metric in gather_metrics(site.settings)} >= {"products"}
