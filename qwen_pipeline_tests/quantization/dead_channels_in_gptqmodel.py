"""Print how padding changes GPTQModel's codes of live channels, without the patch of its solver and with it."""

import json
from importlib import import_module
from typing import Any

import torch

from qwen_pipeline.quantization.gptqmodel import patch_solver
from qwen_pipeline_tests.quantization.padded_layer import LIVE, OUT, padded, tokens_and_weight


def quantized(x: torch.Tensor, w: torch.Tensor, *, act_group_aware: bool) -> torch.Tensor:
    library: Any = import_module("gptqmodel")
    linear = torch.nn.Linear(w.shape[1], OUT, bias=False)
    linear.weight.data = w.clone()
    config = library.GPTQConfig(bits=4, group_size=128, act_group_aware=act_group_aware, desc_act=False, fallback=None)
    solver = import_module("gptqmodel.quantization").GPTQ(linear, qcfg=config)
    solver.quantizer.configure(perchannel=True)
    solver.add_batch(x[None], None)
    return solver.quantize()[0]


def compare(tokens: torch.Tensor, weight: torch.Tensor, *, act_group_aware: bool) -> dict[str, Any]:
    """Quantize the layer without padding and with it; compare the live channels."""

    def error(w: torch.Tensor) -> float:
        return ((tokens @ (w - weight).T).norm() / (tokens @ weight.T).norm()).item()

    live = quantized(tokens, weight, act_group_aware=act_group_aware)
    both = quantized(padded(tokens), padded(weight), act_group_aware=act_group_aware)
    return {
        "changed": (~torch.isclose(both[:, :LIVE], live, rtol=1e-3)).double().mean().item(),
        "live error": error(live),
        "padded error": error(both[:, :LIVE]),
        "dead are zero": not both[:, LIVE:].any().item(),
    }


def main() -> None:
    tokens, weight = tokens_and_weight()
    found: dict[str, dict[str, Any]] = {}
    for name in ("unpatched", "settled"):
        if name == "settled":
            patch_solver()
        for aware in (False, True):
            found[f"{name}, {aware}"] = compare(tokens, weight, act_group_aware=aware)
    print()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
