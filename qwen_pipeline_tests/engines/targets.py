"""What tests have a worker do in GPTQModel's environment."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from qwen_pipeline.engines.protocol import QuantSpec
from qwen_pipeline.engines.solver import Hessian, pack, solve
from qwen_pipeline.progress import Observe


def contract(_: Mapping[str, Any], __: Observe) -> dict[str, Any]:
    """Hold :func:`solve` against GPTQModel's own accumulation and solving."""
    torch.manual_seed(0)
    spec = QuantSpec(group_size=32, device="cpu", threads=1)
    weight, x = torch.randn(64, 96), torch.randn(256, 96)
    before, hessian = weight.clone(), Hessian()
    hessian.add(x)
    ours = solve(weight, hessian, spec)

    library: Any = import_module("gptqmodel")
    linear = torch.nn.Linear(96, 64, bias=False)
    linear.weight.data = weight.clone()
    gptq = import_module("gptqmodel.quantization").GPTQ(
        linear, qcfg=library.GPTQConfig(bits=4, group_size=32, damp_percent=0.05, fallback=None)
    )
    gptq.quantizer.configure(perchannel=True)
    gptq.add_batch(x, None)
    rounded, scales, zeros, g_idx = gptq.quantize()[:4]
    theirs = pack(rounded.detach(), scales, zeros, g_idx, ours.packed.format)

    x[:, 5] = 0
    dead = Hessian()
    dead.add(x)
    return {
        "same_codes": bool(torch.equal(ours.packed.qweight, theirs.qweight)),
        "dead_are_zero": bool((solve(weight, dead, spec).packed.weight_rows(0, 64)[:, 5] == 0).all()),
        "inputs_untouched": bool(torch.equal(weight, before)),
        "damp": ours.damp,
    }
