"""Tokens of each expert, compared with Transformers' own router logits; filling is not counted."""

from pathlib import Path

import pytest
import torch

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.quantization.calibration.expert_coverage import count_expert_tokens, has_experts
from qwen_pipeline_tests.tiny import load_tiny, tiny_model

CPU = ComputeContext(device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_counts_equal_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    root = tiny_model(family, tmp_path, dtype=torch.float32)
    ids = torch.arange(48).reshape(3, 16)
    model = load_tiny(root)
    with torch.inference_mode():
        logits = model(ids, output_router_logits=True).router_logits
    chosen = model.config.num_experts_per_tok
    expected = {
        n: layer.topk(chosen).indices.flatten().bincount(minlength=layer.shape[1]) for n, layer in enumerate(logits)
    }

    found = count_expert_tokens(open_checkpoint(root), ids, torch.ones_like(ids), CPU)

    assert found.keys() == expected.keys()
    assert all(torch.equal(found[layer], expected[layer]) for layer in expected)


def test_filling_is_not_counted(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_model("qwen3_moe", tmp_path))
    ids = torch.arange(32).reshape(2, 16)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    before = count_expert_tokens(checkpoint, ids, mask, CPU)
    ids[1, 6:] = 250
    after = count_expert_tokens(checkpoint, ids, mask, CPU)
    assert all(int(tokens.sum()) == 22 * 2 for tokens in before.values())
    assert all(torch.equal(before[layer], after[layer]) for layer in before)


def test_only_a_mixture_has_experts(tmp_path: Path) -> None:
    assert not has_experts(open_checkpoint(tiny_model("qwen2", tmp_path / "dense")))
    assert has_experts(open_checkpoint(tiny_model("qwen3_moe", tmp_path / "moe")))
