"""plan: tables, JSON and a picture from a config alone."""

import json
from pathlib import Path

import pytest

from qwen_pipeline.evaluation.rank_plot import straddling_groups
from qwen_pipeline_tests.cli.terminal import qwen_pipeline
from qwen_pipeline_tests.qwen.published import config_of


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = config_of("Qwen2-72B, Qwen2.5-72B, Qwen2-VL-72B")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_plan_says_what_each_degree_does(model: Path) -> None:
    for named in (model, model / "config.json"):
        rows = qwen_pipeline("plan", named, "--tp", 1, "--tp", 8, "--group-size", 128, "--json").data["degrees"]
        assert [(row["degree"], row["live"], row["target"]) for row in rows] == [(1, 29568, 29568), (8, 29568, 29696)]
    assert "29,696" in qwen_pipeline("plan", model, "--tp", 8).out


def test_plan_chooses_for_an_engine_within_a_budget(model: Path) -> None:
    data = qwen_pipeline("plan", model, "--engine", "vllm-machete", "--tp", 2, "--json").data
    assert [at["verdict"] for at in data["engines"]] == ["silently wrong"]
    best = data["options"][0]
    assert best["sizes"] == {"intermediate_size": [29568, 29696]}
    assert (best["group_size"], best["fits"], data["lower_degree"]) == (128, True, 1)
    tight = qwen_pipeline("plan", model, "--engine", "vllm-machete", "--tp", 2, "--max-extra", 0.1, "--json").data
    assert [at["name"] for at in tight["options"] if at["fits"]] == ["groups of 64, as it is"]
    assert "best" in qwen_pipeline("plan", model, "--engine", "vllm", "--tp", 2).out


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plan_draws_groups_over_ranks(model: Path, tmp_path: Path, suffix: str) -> None:
    picture = tmp_path / f"ranks.{suffix}"
    assert qwen_pipeline("plan", model, "--tp", 8, "--picture", picture).code == 0
    assert picture.stat().st_size > 1000


def test_groups_straddle_where_a_rank_ends_inside_them() -> None:
    assert straddling_groups(29568, 128, 2) == {115}
    assert straddling_groups(29696, 128, 8) == set()
    assert len(straddling_groups(29568, 128, 8)) == 7


def test_plan_refuses_what_is_not_a_model_or_an_engine(tmp_path: Path, model: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert qwen_pipeline("plan", tmp_path / "empty").code == 2
    assert qwen_pipeline("plan", model, "--engine", "vlm").code == 2
