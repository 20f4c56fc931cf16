"""A headless run of a fine-tune of the second of two bases, by two recipes: GPTQ codes, and 8-bit floats."""

from pathlib import Path

import pytest

from qwen_pipeline.checkpoint.manifest import open_manifest
from qwen_pipeline.checkpoint.store.destinations import CheckpointStore
from qwen_pipeline.status import STAGES, fine_tune_statuses
from qwen_pipeline_tests.cli.terminal import qwen_pipeline
from qwen_pipeline_tests.several import drop, make_several

pytestmark = pytest.mark.slow


def test_every_recipe_makes_a_release_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = make_several(tmp_path / "site")
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    for name, value in site.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("QWEN_PIPELINE_RECIPES__WIDE__QUANTIZATION", '{"bits": 8, "samples": 4}')
    drop(site, "both-large", "other")
    ended = qwen_pipeline("run", "both-large", "--json")
    assert ended.code == 0, ended.data
    products = {each["product"]: each for each in ended.data["products"]}
    assert list(products) == ["both-large@wide", "both-large@floats"]
    stages = {key: {stage["stage"]: stage for stage in each["stages"]} for key, each in products.items()}
    assert list(stages["both-large@wide"]) == list(STAGES)
    assert list(stages["both-large@floats"]) == [stage for stage in STAGES if stage != "calibration"]
    merged = [each["merged"] for each in stages.values()]
    assert merged[0]["path"] == merged[1]["path"]
    assert [each["reused"] for each in merged] == [False, True]
    for key, method in (("both-large@wide", "GPTQ"), ("both-large@floats", "FP8")):
        release = Path(products[key]["release"])
        recipe = products[key]["recipe"]
        assert open_manifest(release).derivation.spec["recipe"] == recipe
        card = (release / "README.md").read_text()
        assert f"It was made by the recipe `{recipe}`." in card
        assert method in card
    store = CheckpointStore(site.settings.store_root)
    assert [len(store.finished("published", key)) for key in products] == [1, 1]
    assert store.finished("published", "both-large") == []
    compared = qwen_pipeline("compare", "both-large", "--json").data["recipes"]
    assert [(row["recipe"], row["format"], row["outcome"]) for row in compared] == [
        ("floats", "fp8-dynamic", "may be released"),
        ("wide", "int8 g32", "may be released"),
    ]
    assert len({row["text"] for row in compared}) == 1
    assert all(float(row["KL mean"]) > 0 and "%" in row["MB"] for row in compared)
    assert "int8 g32" in qwen_pipeline("compare", "both-large").out
    statuses = fine_tune_statuses(site.settings)
    assert {(status.name, status.first_open[1], status.base) for status in statuses} == {
        ("both-large@wide", "done", "large"),
        ("both-large@floats", "done", "large"),
    }
    refused = qwen_pipeline("run", "both-large", "--recipe", "wid", "--json")
    assert (refused.code, "Did you mean wide?" in refused.data["error"]["what"]) == (2, True)
