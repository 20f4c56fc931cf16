"""AutoGPTQ without a GPU: the refusal, and the losses read from its log."""

import csv
import logging
from pathlib import Path

import pytest

from qwen_pipeline.errors import EnvironmentFault
from qwen_pipeline.progress import Progress, unobserved
from qwen_pipeline.quantization.autogptq import LossReader, quantize_directory
from qwen_pipeline.quantization.job import QuantJob
from qwen_pipeline.quantization.spec import QuantSpec


@pytest.fixture
def job(tmp_path: Path) -> QuantJob:
    spec = QuantSpec(engine="autogptq", samples=8, seq_len=10, device="cpu")
    return QuantJob(spec=spec, source=tmp_path, windows=tmp_path / "windows.npy", work_dir=tmp_path)


def test_without_a_gpu_the_environment_is_at_fault(job: QuantJob) -> None:
    with pytest.raises(EnvironmentFault, match="on CUDA only"):
        quantize_directory(job.to_json(), unobserved)


def test_losses_are_read_from_the_log_and_scaled_to_tokens(job: QuantJob) -> None:
    events: list[Progress] = []
    reader = LossReader(job, events.append)
    for message in (
        "Start quantizing layer 2/3",
        "Quantizing mlp.up_proj in layer 2/3...",
        "duration: 0.1",
        "avg loss: 5.0",
    ):
        reader.handle(logging.makeLogRecord({"msg": message}))
    job.packed.mkdir()
    reader.write()
    with job.quant_log.open() as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"layer": "1", "module": "mlp.up_proj", "loss": "0.05", "samples": "80", "damp": "0.05"}]
    assert [(event.done, event.total, event.unit) for event in events] == [(1, 3, "layers")]
