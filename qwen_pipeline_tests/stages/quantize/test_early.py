"""Start of a quantizer: while the stage prepares, ended by a refusal, and with only the GPUs of its spec visible."""

import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline.checkpoint.store.destinations import Directory
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.stages import quantize as stage
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline.workers.environments import WorkerEnvironment
from qwen_pipeline.workers.parent import Worker, started_worker
from qwen_pipeline_tests.chain import GROUP_SIZE, Chain, write_text
from qwen_pipeline_tests.workers.processes import is_running


def test_a_refusal_ends_the_quantizer_that_was_started(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    @contextmanager
    def recording(python: Path, target: str, **options: Any) -> Generator[Worker, None, None]:
        with started_worker(python, target, **options) as worker:
            started.append(worker.process.pid)
            yield worker

    monkeypatch.setattr(stage, "started_worker", recording)
    with pytest.raises(InputRefused, match="1000 windows"):
        quantize(
            source=chain.padded,
            destination=Directory(tmp_path / "out"),
            calibration=write_text(tmp_path / "text.jsonl", documents=2, stride=3),
            spec=QuantSpec(engine="gptqmodel", group_size=GROUP_SIZE, samples=1000, seq_len=64, device="cpu"),
            engine=WorkerEnvironment(name="gptqmodel", python=Path(sys.executable)),
        )
    assert not list(tmp_path.glob("out*"))
    (worker,) = started
    assert not is_running(worker)


@pytest.mark.parametrize(("visible", "seen"), [(None, "0,1"), ("3,5,7", "3,5"), ("", "")])
def test_a_quantizer_sees_only_the_gpus_of_its_spec(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, seen: str
) -> None:
    class Started(Exception):
        pass

    def record(*_: object, env: Mapping[str, str], **__: object) -> None:
        raise Started(env["CUDA_VISIBLE_DEVICES"])

    monkeypatch.setattr(stage, "started_worker", record)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(Started) as started:
        quantize(
            source=chain.padded,
            destination=Directory(tmp_path / "out"),
            calibration=chain.text,
            spec=QuantSpec(engine="gptqmodel", group_size=GROUP_SIZE, samples=1, seq_len=64, device="cuda", gpus=2),
            engine=WorkerEnvironment(name="gptqmodel", python=Path(sys.executable)),
        )
    assert str(started.value) == seen
