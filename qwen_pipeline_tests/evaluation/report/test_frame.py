"""The checks of stages as a DataFrame."""

from pathlib import Path

import pytest

from qwen_pipeline.checkpoint.store.destinations import Artifact
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.checks import CHECKS
from qwen_pipeline.evaluation.report.frame import FRAME_COLUMNS, report_frame
from qwen_pipeline_tests.chain import Chain


def test_each_check_of_each_stage_is_a_row(chain: Chain, validated: Artifact) -> None:
    frame = report_frame(chain.padded, validated.path)
    assert tuple(frame.columns) == FRAME_COLUMNS
    assert set(frame["stage"]) == {"padded", "validated"}
    checks = frame[frame["stage"] == "validated"].set_index("check")
    assert list(checks.index) == [check.name for check in CHECKS]
    assert checks.loc["serves", "outcome"] == "skipped"
    assert checks.loc["perplexity_ratio", "limit"] == 1.2


def test_a_directory_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="has no manifest"):
        report_frame(tmp_path)
