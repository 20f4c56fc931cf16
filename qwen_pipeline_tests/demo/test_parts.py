"""The parts of the demo: the widened MLP, the texts and the LoRA."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.functional import silu

from qwen_pipeline.demo.base import widened
from qwen_pipeline.demo.fine_tune import Training, train_adapter
from qwen_pipeline.demo.texts import write_texts
from qwen_pipeline.progress import Progress
from qwen_pipeline_tests.tiny import tiny_qwen2


def mlp(x_TH: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return (silu(x_TH @ weights["gate_proj"].T) * (x_TH @ weights["up_proj"].T)) @ weights["down_proj"].T


@given(live=st.integers(1, 40), share=st.floats(0, 1))
@settings(deadline=None, max_examples=30)
def test_splitting_channels_keeps_the_function(live: int, share: float) -> None:
    weights = {
        "gate_proj": torch.randn(live, 8, dtype=torch.float64),
        "up_proj": torch.randn(live, 8, dtype=torch.float64),
        "down_proj": torch.randn(8, live, dtype=torch.float64),
    }
    x_TH = torch.randn(5, 8, dtype=torch.float64)

    wide = widened(weights, live + int(share * live))

    assert wide["gate_proj"].shape[0] == live + int(share * live)
    torch.testing.assert_close(mlp(x_TH, wide), mlp(x_TH, weights), rtol=1e-12, atol=1e-12)


def test_held_out_topics_are_in_no_other_file(tmp_path: Path) -> None:
    texts = write_texts(tmp_path)
    held_out = [json.loads(line)["text"] for line in texts.held_out.read_text().splitlines()]
    others = texts.training.read_text() + texts.calibration.read_text()

    assert len(held_out) >= 10
    assert not any(json.dumps(text) in others for text in held_out)


@pytest.mark.slow
def test_peft_trains_the_adapter_and_it_is_renamed_once_complete(tmp_path: Path) -> None:
    base = tiny_qwen2(tmp_path / "base")
    texts = tmp_path / "texts.jsonl"
    chat = [{"role": "user", "content": "a model"}, {"role": "assistant", "content": "a small model reads"}]
    texts.write_text(json.dumps({"messages": chat * 40}) + "\n")
    steps: list[Progress] = []

    out = train_adapter(
        base=base, texts=texts, out=tmp_path / "lora", training=Training(steps=3, seq_len=16), observe=steps.append
    )

    factors = load_file(out / "adapter_model.safetensors")
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 16
    assert all(factor.any() for name, factor in factors.items() if "lora_B" in name)
    assert [step.done for step in steps] == [1, 2, 3]
    assert (out / "tokenizer.json").exists()
    assert not list(tmp_path.glob(".*.partial"))
