"""The demo on the command line, and the quality of its release."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline_tests.in_transformers import in_transformers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

FINE_TUNE = "python-tutor"


@dataclass(frozen=True)
class Demo:
    root: Path
    result: Mapping[str, Any]

    def run(self, *arguments: str, **environment: str) -> Mapping[str, Any]:
        command = [sys.executable, "-m", "qwen_pipeline", *arguments, "--json"]
        env = {**os.environ, **environment}
        env.pop("DAGSTER_HOME", None)
        ended = subprocess.run(command, cwd=self.root, env=env, stdout=subprocess.PIPE, text=True, check=False)
        assert ended.returncode == 0, ended.stdout
        return json.loads(ended.stdout)

    def latest(self, stage: str) -> Path:
        return (self.root / "workspace" / "store" / stage / FINE_TUNE / "latest").resolve()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    root = tmp_path_factory.mktemp("demo")
    return Demo(root, Demo(root, {}).run("demo"))


def test_fine_tuning_helps_and_quantization_costs_little(demo: Demo) -> None:
    perplexity = demo.result["perplexity"]

    assert perplexity["merged"] < 0.9 * perplexity["base"]
    assert abs(perplexity["padded"] / perplexity["merged"] - 1) < 1e-4
    assert perplexity["quantized"] / perplexity["merged"] <= 1.20


def test_merging_and_padding_add_little_memory(demo: Demo) -> None:
    added = {stage["stage"]: stage["added_memory_bytes"] for stage in demo.result["stages"]}

    assert added["merged"] < 300e6
    assert added["padded"] < 300e6


def test_the_wrong_order_is_refused(demo: Demo) -> None:
    assert "quantize" in demo.result["wrong_order"]["what"] + demo.result["wrong_order"]["remedy"]


def test_the_release_loads_in_transformers_and_answers(demo: Demo) -> None:
    found = in_transformers("qwen_pipeline_tests.demo.answer_in_transformers", str(demo.latest("published")))

    assert "Paris" in found["answer"]
    assert found["width"] == 1728


def test_a_second_demo_reuses_everything(demo: Demo) -> None:
    start = time.monotonic()
    again = demo.run("demo")

    assert all(stage["reused"] for stage in again["stages"])
    assert again["perplexity"] == demo.result["perplexity"]
    assert time.monotonic() - start < 120


def test_quantization_to_eight_bits_costs_at_most_one_percent(demo: Demo) -> None:
    demo.run("run", FINE_TUNE, QWEN_PIPELINE_QUANTIZATION__BITS="8", QWEN_PIPELINE_QUANTIZATION__RECIPE="gptq")
    report = json.loads((demo.latest("validated") / "report.json").read_text())
    perplexity = {role: figures["perplexity"] for role, figures in report["findings"]["models"].items()}

    assert perplexity["quantized"] / perplexity["merged"] <= 1.01
