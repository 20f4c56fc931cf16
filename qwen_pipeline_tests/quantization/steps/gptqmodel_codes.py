"""The package's own GPTQ loop beside GPTQModel's solver; runs in GPTQModel's environment."""

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any
from unittest.mock import patch

import torch

from qwen_pipeline.progress import Observe
from qwen_pipeline.quantization.dead_channels import settle_dead_channels
from qwen_pipeline.quantization.solver import pack
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.quantization.steps import solve
from qwen_pipeline.quantization.steps.gptq import round_columns
from qwen_pipeline.quantization.steps.scale_search import stored
from qwen_pipeline.quantization.steps.target_correction import InputError
from qwen_pipeline.transforms.codes.gptq import CODES, PackedLinear, gptq_format
from qwen_pipeline_tests.quantization.steps.layer_inputs import IN, TOKENS, LayerInputs, layer_inputs


def compare(_: Mapping[str, Any], __: Observe) -> dict[str, Any]:
    """Return for each group size and order the code tensors that differ, without any step beyond GPTQ."""
    inputs = layer_inputs()
    inputs.quantized[:, 5] = 0
    found: dict[str, Any] = {}
    for bits, group_size, aware in product((4, 8), (32, 64, 128), (True, False)):
        spec = QuantSpec(bits=bits, group_size=group_size, act_group_aware=aware, device="cpu", threads=1)
        with patch.object(solve, "round_columns", partial(round_columns, block_size=group_size)):
            own = solve.solve_by_recipe({"q": inputs.weight}, inputs.hessian(), InputError(), spec)["q"]
        packed, loss = by_gptqmodel(inputs, spec)
        differing = [code for code in CODES if not torch.equal(getattr(own.packed, code), getattr(packed, code))]
        found[f"{bits}, {group_size}, {aware}"] = [differing, own.loss / loss]
    return found


def by_gptqmodel(inputs: LayerInputs, spec: QuantSpec) -> tuple[PackedLinear, float]:
    """Solve with GPTQModel, with scales that are rounded to float16 before they are used.

    Its blocks are single groups: in larger ones it computes the scales of all groups but the first from weights that do
    not make up for the errors of the first yet.
    """
    library: Any = import_module("gptqmodel.quantization")
    config = import_module("gptqmodel").GPTQConfig(
        bits=spec.bits, group_size=spec.group_size, act_group_aware=spec.act_group_aware, fallback=None
    )
    linear = torch.nn.Linear(IN, len(inputs.weight), bias=False)
    linear.weight.data = inputs.weight.clone()
    gptq = library.GPTQ(linear, qcfg=config)
    gptq.quantizer.configure(perchannel=True)
    gptq.module_copy, gptq.H, gptq.nsamples = inputs.weight.clone(), inputs.hessian().pop_mean(), TOKENS
    settle_dead_channels(gptq.H, gptq.module_copy)
    find_params = type(gptq.quantizer).find_params

    def find_stored(self: Any, x: torch.Tensor, weight: bool = False) -> None:
        find_params(self, x, weight)
        self.scale = stored(self.scale)

    with patch.object(type(gptq.quantizer), "find_params", find_stored):
        rounded, scales, zeros, g_idx, _, loss, *_ = gptq.quantize(blocksize=spec.group_size)
    form = gptq_format({"quantization_config": spec.quantization_config("")})
    return pack(rounded.detach(), scales, zeros, g_idx, form), float(loss)
