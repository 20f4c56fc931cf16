"""Recorded kernels give what the function gives."""

from functools import partial

import pytest
import torch

from qwen_pipeline.quantization.recipes import ScaleSearch
from qwen_pipeline.quantization.steps import gptq
from qwen_pipeline.quantization.steps.scale_search import searched_scales


@pytest.mark.gpu
@pytest.mark.parametrize("inputs", [512, 320])  # the last block of the second is smaller
def test_a_recorded_block_has_the_bytes_of_the_columns_one_by_one(inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x_NI = torch.randn(1024, inputs, device="cuda")
    factor = gptq.factored(x_NI.T @ x_NI, torch.arange(inputs, device="cuda"), 0.05)
    weight_OI = torch.randn(96, inputs, device="cuda")
    scales_of = partial(searched_scales, bits=4, search=ScaleSearch())
    recorded = gptq.round_columns(weight_OI, factor, scales_of, bits=4, group_size=64)
    monkeypatch.setattr(gptq, "replayed", lambda function: function)
    one_by_one = gptq.round_columns(weight_OI, factor, scales_of, bits=4, group_size=64)
    for part in ("weight", "target", "scales", "loss"):
        assert torch.equal(getattr(recorded, part), getattr(one_by_one, part)), part
