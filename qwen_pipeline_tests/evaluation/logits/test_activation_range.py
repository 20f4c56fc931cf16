"""The largest activation of each layer, compared with hooks on a plain Transformers model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.evaluation.figures import Peak
from qwen_pipeline.evaluation.logits.streamed import activation_peaks, evaluate
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline_tests.tiny import VOCABULARY, tiny_model

WINDOWS = list(torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0)))
GATE, UP = (f"model.layers.1.mlp.{kind}_proj.weight" for kind in ("gate", "up"))


def peaks(root: Path) -> Sequence[Peak]:
    context = ComputeContext(device=torch.device("cpu"), dtype=torch.float32)
    return evaluate({"p": open_checkpoint(root)}, WINDOWS, reference="p", compared=[], context=context)["p"].peaks


def scaled(root: Path, **factors: float) -> Path:
    """Multiply the weights whose names have given endings."""
    file = root / "model.safetensors"
    tensors = {name: t * factors.get(name.split(".")[-2], 1) for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return root


def test_the_product_inside_an_mlp_is_measured_at_its_place(tmp_path: Path) -> None:
    root = scaled(tiny_model("qwen2", tmp_path / "p", dtype=torch.float32), up_proj=3e4)
    model: Any = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
    entered: dict[str, float] = {}

    def hook(name: str) -> Any:
        return lambda _, inputs, output: entered.__setitem__(name, max(t.abs().max().item() for t in (*inputs, output)))

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(hook(name))
    with torch.no_grad():
        model(torch.stack(WINDOWS))
    found = peaks(root)
    assert [peak.layer for peak in found] == [0, 1]
    for peak in found:
        assert peak.place in ("mlp.up_proj", "mlp.down_proj")
        assert peak.magnitude == pytest.approx(entered[f"model.layers.{peak.layer}.{peak.place}"], rel=1e-4)
        assert peak.magnitude > 65504 / 2


def test_activations_are_the_same_without_predictions(tmp_path: Path) -> None:
    root = tiny_model("qwen2", tmp_path / "p", dtype=torch.float32)
    context = ComputeContext(device=torch.device("cpu"), dtype=torch.float32)
    assert activation_peaks(open_checkpoint(root), WINDOWS, context) == peaks(root)


def test_experts_are_measured_too(tmp_path: Path) -> None:
    """Only experts have large activations here; their weights in a product may be unnamed copies."""
    quiet = tiny_model("qwen3_moe", tmp_path / "quiet", dtype=torch.float32)
    loud = scaled(tiny_model("qwen3_moe", tmp_path / "loud", dtype=torch.float32), up_proj=1e5)
    assert max(peak.magnitude for peak in peaks(quiet)) < 1e3
    assert min(peak.magnitude for peak in peaks(loud)) > 65504
