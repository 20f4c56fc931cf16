"""The status of stages as a table, and the comparison of a validation with the last release."""

import shutil
from dataclasses import replace
from pathlib import Path

from qwen_pipeline.checkpoint.store.destinations import Artifact, CheckpointStore
from qwen_pipeline.config import Settings
from qwen_pipeline.stages.publish import publish
from qwen_pipeline.status import FRAME_COLUMNS, STAGES, against_last_release, status_frame
from qwen_pipeline_tests.chain import Chain
from qwen_pipeline_tests.edited_validations import Change, rewritten


def test_a_validation_is_compared_with_the_last_release_of_other_bytes(
    chain: Chain, validated: Artifact, tmp_path: Path
) -> None:
    store = CheckpointStore(tmp_path)
    publish(
        quantized=chain.quantized,
        validated=validated.path,
        destination=store.slot("bot"),
        base_model="Qwen/Tiny",
        fine_tune="bot",
    )
    assert "no earlier release" in against_last_release(store, "bot", validated).detail

    derivation = replace(
        validated.manifest.derivation, inputs={**validated.manifest.derivation.inputs, "candidate": "x"}
    )
    later = replace(validated, manifest=replace(validated.manifest, derivation=derivation))
    report = against_last_release(store, "bot", later)
    assert report.passed
    assert report.measured == 1.0
    assert "no earlier release" in against_last_release(store, "another", later).detail


def test_the_frame_has_a_row_for_each_stage(chain: Chain, validated: Artifact, tmp_path: Path) -> None:
    """Outputs whose inputs are missing are stale, and an edited one is damaged, with the reason as its remark."""
    settings = Settings(base_model="base", workspace=tmp_path)
    empty = status_frame(settings)
    assert list(empty.columns) == list(FRAME_COLUMNS)
    assert empty.empty

    skipped = {"skipped": True, "passed": False, "measured": None, "limit": None}
    failed: Change = {"checks": {"kl_divergence": {"passed": False}, "float16_range": skipped, "serves": skipped}}
    (tmp_path / "store" / "padded" / "bot").mkdir(parents=True)
    shutil.copytree(chain.padded, tmp_path / "store" / "padded" / "bot" / "0")
    rewritten(validated.path, tmp_path / "store" / "validated" / "bot" / "0", failed)
    rewritten(validated.path, tmp_path / "store" / "validated" / "edited" / "0", failed, files=["report.json"])
    for stage, name in (("padded", "bot"), ("validated", "bot"), ("validated", "edited")):
        (tmp_path / "store" / stage / name / "latest").symlink_to("0")

    frame = status_frame(settings).set_index(["name", "stage"])
    assert list(frame.index) == [(name, stage) for name in ("bot", "edited") for stage in STAGES]
    assert frame.loc[("bot", "merged"), "state"] == "missing"
    assert frame.loc[("bot", "padded"), "state"] == "stale"
    assert frame.loc[("bot", "padded"), "path"] == str(tmp_path / "store" / "padded" / "bot" / "0")
    assert str(frame.loc[("bot", "padded"), "digest"]).startswith("sha256:")
    assert frame.loc[("bot", "padded"), "remark"] == "no longer in the inbox"
    assert frame.loc[("bot", "validated"), "failed_checks"] == "kl_divergence, float16_range"
    assert frame.loc[("edited", "validated"), "state"] == "damaged"
    assert frame["path"].isna().loc[("edited", "validated")]
    assert "report.json has the SHA-256" in str(frame.loc[("edited", "validated"), "remark"])
