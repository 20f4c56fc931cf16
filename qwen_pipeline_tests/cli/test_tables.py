"""Check tables: the four outcomes, their counts, and the JSON values."""

from dataclasses import replace

import pytest
from rich.console import Console

from qwen_pipeline.checkpoint.store.destinations import Artifact, Directory
from qwen_pipeline.cli.tables import artifact_data, blocking_failure, check_table
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.reports import CheckReport, CheckSpec, dump_reports
from qwen_pipeline.stages.pad import pad
from qwen_pipeline_tests.tiny import tiny_qwen2

STRUCTURE = CheckSpec(name="structure", description="A check that blocks.")
SERVES = CheckSpec(name="serves", description="Another check that blocks.")
TASKS = CheckSpec(name="tasks", description="A check that only warns.", blocking=False)


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    root = tmp_path_factory.mktemp("padded")
    spec = PaddingSpec(group_size=32, tensor_parallel=2)
    return pad(source=tiny_qwen2(root / "base"), destination=Directory(root / "padded"), spec=spec)


def with_checks(artifact: Artifact, *reports: CheckReport) -> Artifact:
    return replace(artifact, manifest=replace(artifact.manifest, result={"checks": dump_reports(reports)}))


def printed(artifact: Artifact) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(check_table([artifact]))
    return capture.get()


def test_a_skipped_check_neither_passes_nor_blocks(padded: Artifact) -> None:
    skipped = SERVES.skipped("No engine is configured.")
    artifact = with_checks(padded, STRUCTURE.report(passed=True, detail="Sound."), skipped)
    text = printed(artifact)
    assert "2 checks: 1 passed, 1 skipped." in text
    assert "skipped padded serves: No engine is configured." in text
    assert "Sound." not in text
    assert blocking_failure([artifact]) is None
    assert [check["skipped"] for check in artifact_data(artifact)["checks"]] == [False, True]


def test_failures_and_warnings_are_counted_and_explained(padded: Artifact) -> None:
    reports = (STRUCTURE.report(passed=False, detail="A tensor is missing."), TASKS.report(passed=False, detail="Low."))
    artifact = with_checks(padded, *reports)
    text = printed(artifact)
    assert "2 checks: 1 failed, 1 warning." in text
    assert "FAILED padded structure: A tensor is missing." in text
    assert "warning padded tasks: Low." in text
    assert "The check structure failed" in str(blocking_failure([artifact]))


def test_manifests_written_before_checks_could_be_skipped_have_the_key_in_json(padded: Artifact) -> None:
    stored = dump_reports([STRUCTURE.report(passed=True, detail="Sound.")])[0]
    del stored["skipped"]
    artifact = replace(padded, manifest=replace(padded.manifest, result={"checks": [stored]}))
    assert artifact_data(artifact)["checks"][0]["skipped"] is False
