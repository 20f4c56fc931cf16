"""plan, status and run before anything was run."""

import json
from pathlib import Path

from qwen_pipeline_tests.cli.terminal import qwen_pipeline
from qwen_pipeline_tests.site import Site


def test_plan_says_what_each_degree_does(tmp_path: Path) -> None:
    config = {"model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 29568}
    config |= {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for model in (tmp_path, tmp_path / "config.json"):
        rows = qwen_pipeline("plan", model, "--tp", 1, "--tp", 8, "--group-size", 128, "--json").data["degrees"]
        assert [(row["degree"], row["live"], row["target"]) for row in rows] == [(1, 29568, 29568), (8, 29568, 29696)]
    assert "29,696" in qwen_pipeline("plan", tmp_path, "--tp", 8).out


def test_plan_refuses_what_is_not_a_model(tmp_path: Path) -> None:
    assert qwen_pipeline("plan", tmp_path).code == 2


def test_status_of_nothing_says_where_to_begin(site: Site) -> None:
    ended = qwen_pipeline("status")
    assert ended.code == 0
    assert str(site.inbox.root) in ended.out.replace("\n", "")
    assert qwen_pipeline("status", "--json").data == {"fine_tunes": []}


def test_status_shows_arrivals_and_what_is_odd_about_them(site: Site) -> None:
    site.drop("whole")
    (site.drop("broken") / "adapter_config.json").unlink()
    found = {row["name"]: row for row in qwen_pipeline("status", "--json").data["fine_tunes"]}
    assert "adapter_config.json" in found["broken"]["remark"]
    assert found["whole"]["remark"] is None
    assert {stage["state"] for stage in found["whole"]["stages"].values()} == {"missing"}


def test_run_refuses_before_anything_is_written(site: Site) -> None:
    unknown = qwen_pipeline("run", "nobody", "--json")
    assert (unknown.code, unknown.data["error"]["kind"]) == (2, "InputRefused")
    site.drop()
    (site.root / "calibration.jsonl").unlink()
    missing = qwen_pipeline("run", "poet", "--json")
    assert (missing.code, missing.data["error"]["exit_code"]) == (2, 2)
    assert "calibration" in missing.data["error"]["what"]
    assert not site.settings.store_root.exists()
