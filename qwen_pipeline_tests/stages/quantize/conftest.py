"""A tiny model, quantized once by GPTQModel and read by many tests."""

import json
from pathlib import Path

import pytest

from qwen_pipeline.checkpoint.store.destinations import Directory
from qwen_pipeline.progress import Progress
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline.workers.environments import WorkerEnvironment, find_environment
from qwen_pipeline_tests.stages.quantize.quantizing import SPEC, Run
from qwen_pipeline_tests.tiny import tiny_qwen2


@pytest.fixture(scope="session")
def engine() -> WorkerEnvironment:
    return find_environment("gptqmodel")


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("calibration") / "mixed.jsonl"
    texts = [{"text": f"Record {i} speaks of {i * i} things, in prose. " * 3} for i in range(12)]
    talks = [
        {"messages": [{"role": "user", "content": f"How many are {i}?"}, {"role": "assistant", "content": f"{i}."}]}
        for i in range(12)
    ]
    file.write_text("\n".join(json.dumps(record) for record in texts + talks))
    return file


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, calibration: Path, engine: WorkerEnvironment) -> Run:
    root = tmp_path_factory.mktemp("quantize")
    source = tiny_qwen2(root / "source", intermediate_size=128, shards=2)
    progress: list[Progress] = []
    artifact = quantize(
        source=source,
        destination=Directory(root / "quantized"),
        calibration=calibration,
        spec=SPEC,
        engine=engine,
        observe=progress.append,
    )
    return Run(source=source, calibration=calibration, artifact=artifact, progress=progress)
