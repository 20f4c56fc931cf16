"""The log of a run as JSON lines, through the instance that ``deploy/`` configures."""

import json
from pathlib import Path

import dagster as dg
import pytest
import yaml

from qwen_pipeline_tests import REPOSITORY


def test_every_line_has_run_partition_and_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @dg.asset(partitions_def=dg.StaticPartitionsDefinition(["poet"]))
    def quantized(context: dg.AssetExecutionContext) -> None:
        context.log.info("layer 3 of 80")
        raise ValueError("no space left")

    logs = yaml.safe_load((REPOSITORY / "deploy" / "postgres" / "dagster.yaml").read_text())["python_logs"]
    with dg.instance_for_test(temp_dir=str(tmp_path), overrides={"python_logs": logs}) as instance:
        result = dg.materialize([quantized], partition_key="poet", instance=instance, raise_on_error=False)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["run"] for line in lines} == {result.run_id}
    assert {line["partition"] for line in lines} == {"poet"}
    (progress,) = (line for line in lines if line["message"] == "layer 3 of 80")
    assert (progress["level"], progress["stage"]) == ("INFO", "quantized")
    assert "event" not in progress
    (failure,) = (line for line in lines if line.get("event") == "STEP_FAILURE")
    assert "ValueError: no space left" in failure["error"]
