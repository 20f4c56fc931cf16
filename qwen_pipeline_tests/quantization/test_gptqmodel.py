"""Patches of GPTQModel's own loop, tested with the library itself."""

from pathlib import Path

import numpy as np
import pytest

from qwen_pipeline.errors import EnvironmentFault
from qwen_pipeline.progress import Progress
from qwen_pipeline.quantization.job import QuantJob
from qwen_pipeline.workers.environments import find_environment
from qwen_pipeline.workers.parent import run_worker, started_worker
from qwen_pipeline_tests.stages.quantize.quantizing import SPEC
from qwen_pipeline_tests.tiny import tiny_model

QUANTIZE = "qwen_pipeline.quantization.gptqmodel:quantize_directory"


@pytest.mark.slow
@pytest.mark.engine
def test_an_error_in_a_thread_is_reported_before_it_ends_the_process(tmp_path: Path) -> None:
    python, target = find_environment("gptqmodel").python, "qwen_pipeline_tests.quantization.targets:lose_a_thread"
    with pytest.raises(EnvironmentFault, match="Memory ran out"):
        run_worker(python, target, {}, log=tmp_path / "log", env={"GPTQMODEL_CPU_WORKERS": "2"})


@pytest.fixture
def job(tmp_path: Path) -> QuantJob:
    """A mixture of a family that GPTQModel can resume."""
    source = tiny_model("qwen3_moe", tmp_path / "source", hidden_size=64, moe_intermediate_size=64, num_hidden_layers=4)
    job = QuantJob(spec=SPEC, source=source, windows=tmp_path / "windows.npy", work_dir=tmp_path / "work")
    np.save(job.windows, np.random.default_rng(0).integers(3, 256, (8, 64), dtype=np.int32))
    np.save(job.mask, np.ones((8, 64), dtype=np.uint8))
    job.resume.mkdir(parents=True)
    return job


@pytest.mark.slow
def test_layers_that_cannot_be_resumed_from_are_removed(job: QuantJob, tmp_path: Path) -> None:
    saved = job.resume / "checkpoint"
    saved.mkdir()
    (saved / "CURRENT").write_text("torn")
    with pytest.raises(EnvironmentFault, match="cannot resume from the layers that it saved") as caught:
        run_worker(find_environment("gptqmodel").python, QUANTIZE, job.to_json(), log=tmp_path / "log")
    assert "run again" in caught.value.remedy
    assert not saved.exists()


@pytest.mark.slow
def test_a_terminated_run_resumes_from_saved_layers(job: QuantJob, tmp_path: Path) -> None:
    seen: list[Progress] = []
    with started_worker(find_environment("gptqmodel").python, QUANTIZE) as worker:

        def stop(event: Progress) -> None:
            if event.done == 1:
                worker.process.terminate()

        with pytest.raises(EnvironmentFault, match="was terminated"):
            worker.run(job.to_json(), log=tmp_path / "log", observe=stop)
    run_worker(find_environment("gptqmodel").python, QUANTIZE, job.to_json(), log=tmp_path / "log", observe=seen.append)
    assert min(event.done for event in seen) == 2
