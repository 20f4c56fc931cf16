"""``status`` and ``run`` before any run."""

import shutil
from pathlib import Path

from qwen_pipeline.checkpoint.store.destinations import CheckpointStore
from qwen_pipeline.stages.repair import repair
from qwen_pipeline_tests.cli.terminal import qwen_pipeline
from qwen_pipeline_tests.codes import Packing, write_checkpoint_of_codes
from qwen_pipeline_tests.site import Site


def test_an_empty_status_names_the_inbox(site: Site) -> None:
    ended = qwen_pipeline("status")
    assert ended.code == 0
    assert str(site.inbox.root) in ended.out.replace("\n", "")
    assert qwen_pipeline("status", "--json").data == {"fine_tunes": [], "imports": []}


def test_status_shows_uploads_and_their_faults(site: Site) -> None:
    site.drop("whole")
    (site.drop("broken") / "adapter_config.json").unlink()
    found = {row["name"]: row for row in qwen_pipeline("status", "--json").data["fine_tunes"]}
    assert "adapter_config.json" in found["broken"]["remark"]
    assert found["whole"]["remark"] is None
    assert {stage["state"] for stage in found["whole"]["stages"].values()} == {"missing"}


def test_status_shows_the_repair_of_imports(site: Site) -> None:
    early = site.settings.imports / "early"
    write_checkpoint_of_codes(early, Packing(method="gptq", group_size=16), width=48)
    (site.settings.imports / "whole").mkdir()

    def found() -> dict[str, tuple[str, str | None]]:
        rows = qwen_pipeline("status", "--json").data["imports"]
        return {row["name"]: (row["stages"]["repaired"]["state"], row["remark"]) for row in rows}

    assert found()["early"] == ("missing", None)
    assert "config.json" in str(found()["whole"][1])
    repair(source=early, destination=CheckpointStore(site.settings.store_root).slot("early"), tensor_parallel=2)
    assert found()["early"] == ("done", None)
    said = qwen_pipeline("status").out
    assert "import" in said
    assert "repaired" in said
    shutil.rmtree(early)
    write_checkpoint_of_codes(early, Packing(method="gptq", group_size=16), width=80)
    assert found()["early"] == ("stale", None)


def test_targets_that_padding_cannot_serve_are_refused_before_anything_is_written(site: Site) -> None:
    _configure_targets(site, "{ vllm-exllama = [3] }")
    site.drop()
    refused = qwen_pipeline("run", "poet", "--json")
    assert refused.code == 2
    assert "4 attention heads are not divisible by 3" in refused.data["error"]["what"]
    assert "TP 1 with groups of" in refused.data["error"]["remedy"]
    assert not site.settings.store_root.exists()


def _configure_targets(site: Site, targets: str) -> None:
    file: Path = site.root / "qwen_pipeline.toml"
    file.write_text(file.read_text().replace("tensor_parallel = 2", f"targets = {targets}"))


def test_run_refuses_before_anything_is_written(site: Site) -> None:
    unknown = qwen_pipeline("run", "unknown", "--json")
    assert (unknown.code, unknown.data["error"]["kind"]) == (2, "InputRefused")
    site.drop()
    (site.root / "calibration.jsonl").unlink()
    missing = qwen_pipeline("run", "poet", "--json")
    assert (missing.code, missing.data["error"]["exit_code"]) == (2, 2)
    assert "calibration" in missing.data["error"]["what"]
    assert not site.settings.store_root.exists()
