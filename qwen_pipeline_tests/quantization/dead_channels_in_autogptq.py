"""Print the share of live weights that AutoGPTQ changes with padding, without the patch of its solver and with it."""

import json
from importlib import import_module
from typing import Any

import torch

from qwen_pipeline.quantization.autogptq import patch_solver
from qwen_pipeline_tests.quantization.padded_layer import LIVE, OUT, padded, tokens_and_weight


def quantized(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    library: Any = import_module("auto_gptq.quantization.gptq")
    linear = torch.nn.Linear(w.shape[1], OUT, bias=False)
    linear.weight.data = w.clone()
    solver = library.GPTQ(linear)
    solver.quantizer.configure(4, perchannel=True, sym=True, mse=False)
    solver.add_batch(x[None], None)
    solver.fasterquant(percdamp=0.05, group_size=128)
    return linear.weight.data


def changed(tokens: torch.Tensor, weight: torch.Tensor) -> float:
    live, both = quantized(tokens, weight), quantized(padded(tokens), padded(weight))
    return (~torch.isclose(both[:, :LIVE], live, rtol=1e-3)).double().mean().item()


def main() -> None:
    tokens, weight = tokens_and_weight()
    before = changed(tokens, weight)
    patch_solver()
    print()
    print(json.dumps([before, changed(tokens, weight)]))


if __name__ == "__main__":
    main()
