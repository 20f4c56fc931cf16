"""Interrupted quantizations: they resume, and end in the same bytes."""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline.checkpoint.journal import JOURNAL
from qwen_pipeline.checkpoint.store.destinations import Directory
from qwen_pipeline.progress import Progress
from qwen_pipeline.quantization.spec import Device
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline.workers.environments import WorkerEnvironment
from qwen_pipeline_tests import REPOSITORY
from qwen_pipeline_tests.stages.quantize.kills import descendants, require_ended
from qwen_pipeline_tests.stages.quantize.quantizing import SPEC, Run
from qwen_pipeline_tests.tiny import tiny_model

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
QUANTIZE = "qwen_pipeline_tests.stages.quantize.quantize_and_report"


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), CUDA])
@pytest.mark.parametrize(
    ("family", "width", "resumes"),
    [("qwen2", "intermediate_size", False), ("qwen3_moe", "moe_intermediate_size", True)],
)
def test_a_killed_run_ends_in_the_same_bytes_when_run_again(
    tmp_path: Path, calibration: Path, engine: WorkerEnvironment, family: str, width: str, resumes: bool, device: Device
) -> None:
    """GPTQModel's own loop resumes after the finished layers if it supports the family; no loss is missing then."""
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 4, width: 64}
    source = tiny_model(family, tmp_path / "source", **sizes)
    spec = replace(SPEC, device=device)
    quantize_into = partial(quantize, source=source, calibration=calibration, spec=spec, engine=engine)
    undisturbed, out = quantize_into(destination=Directory(tmp_path / "undisturbed")), tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-m", QUANTIZE, source, out, calibration, json.dumps(spec.to_json())],
        cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        assert any("layers.2" in line for line in parent.stdout)
        workers = descendants(parent.pid)
        parent.send_signal(signal.SIGKILL)
    assert workers
    require_ended(workers, seconds=10)
    assert not out.exists()

    seen: list[Progress] = []
    again = quantize_into(destination=Directory(out), observe=seen.append)

    assert (min(event.done for event in seen if event.task == "quantize") >= 2) == resumes
    assert again.manifest.contents.tensors == undisturbed.manifest.contents.tensors
    assert again.manifest.content_digest == undisturbed.manifest.content_digest
    assert [reproducible(loss) for loss in again.manifest.result["losses"]] == [
        reproducible(loss) for loss in undisturbed.manifest.result["losses"]
    ]
    assert quantize_into(destination=Directory(out)).reused


def reproducible(loss: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures that do not depend on time or memory."""
    return {name: loss[name] for name in ("module", "loss", "samples", "damp")}


@pytest.mark.slow
def test_a_quantizer_that_has_finished_is_not_run_again(run: Run, tmp_path: Path, engine: WorkerEnvironment) -> None:
    """Codes that were written are not written again either."""
    out, seen = tmp_path / "out", list[Progress]()
    quantize_into = partial(
        quantize,
        source=run.source,
        destination=Directory(out),
        calibration=run.calibration,
        spec=SPEC,
        engine=engine,
    )

    def interrupt(_: Progress) -> None:
        if (out.with_name("out.partial") / JOURNAL).exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_into(observe=interrupt)
    again = quantize_into(observe=seen.append)
    assert "quantize" not in {event.task for event in seen}
    assert next(event.done for event in seen if event.task == "write quantized checkpoint") > 0
    assert again.manifest.content_digest == run.artifact.manifest.content_digest
    assert sum(again.manifest.result["seconds"]["stage"].values()) > 0
