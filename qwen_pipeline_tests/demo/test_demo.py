"""The demo, as a newcomer runs it, and what its release is good for."""

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
CHAT = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, device_map="cpu")
talk = [{"role": "user", "content": "What is the capital of France?"}]
prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1]:]
width = model.config.intermediate_size
print(json.dumps({"answer": tokenizer.decode(answer, skip_special_tokens=True), "width": width}))
"""


@dataclass(frozen=True)
class Demo:
    root: Path
    answer: Mapping[str, Any]

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
    perplexity = demo.answer["perplexity"]

    assert perplexity["merged"] < 0.9 * perplexity["base"]
    assert abs(perplexity["padded"] / perplexity["merged"] - 1) < 1e-4
    assert perplexity["quantized"] / perplexity["merged"] <= 1.20


def test_merge_and_pad_stay_small(demo: Demo) -> None:
    added = {stage["stage"]: stage["added_memory_bytes"] for stage in demo.answer["stages"]}

    assert added["merged"] < 300e6
    assert added["padded"] < 300e6


def test_the_wrong_order_is_refused(demo: Demo) -> None:
    assert "quantize" in demo.answer["wrong_order"]["what"] + demo.answer["wrong_order"]["remedy"]


def test_the_release_loads_in_transformers_and_answers(demo: Demo) -> None:
    said = in_transformers(CHAT, str(demo.latest("published")))

    assert "Paris" in said["answer"]
    assert said["width"] == 1728


def test_a_second_demo_takes_seconds(demo: Demo) -> None:
    start = time.monotonic()
    again = demo.run("demo")

    assert all(stage["reused"] for stage in again["stages"])
    assert again["perplexity"] == demo.answer["perplexity"]
    assert time.monotonic() - start < 120


def test_eight_bits_cost_next_to_nothing(demo: Demo) -> None:
    demo.run("run", FINE_TUNE, QWEN_PIPELINE_QUANTIZATION__BITS="8")
    report = json.loads((demo.latest("validated") / "report.json").read_text())
    perplexity = {role: figures["perplexity"] for role, figures in report["findings"]["models"].items()}

    assert perplexity["quantized"] / perplexity["merged"] <= 1.01
