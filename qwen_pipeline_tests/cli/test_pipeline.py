"""status and run before anything was run."""

from qwen_pipeline_tests.cli.terminal import qwen_pipeline
from qwen_pipeline_tests.site import Site


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
