"""GPTQModel's solver on its own, with a Hessian of ours: the one place that knows how it is driven.

Its file churns from release to release, so what is relied on here has contract tests (``engines/test_solver.py``).
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from qwen_pipeline.engines.dead_channels import settle_dead_channels
from qwen_pipeline.engines.protocol import QuantSpec
from qwen_pipeline.errors import CheckFailed
from qwen_pipeline.transforms.gptq_codes import GptqFormat, PackedLinear, gptq_format, pack_rows

BLOCK_OUTPUTS = 1024
"""Outputs whose codes are packed at a time."""


@dataclass(slots=True)
class Hessian:
    """``2 / N * sum x x^T`` over N tokens [I, I], float32, of inputs as they arrive."""

    total: Tensor | None = None
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        """Take inputs [..., I] into account.

        On a GPU 16-bit inputs are multiplied as they are and summed in float32: their products are exact there, and
        twelve times as fast as in float32.
        """
        x_NI = x.flatten(0, -2)
        half = x_NI.device.type == "cuda" and x_NI.dtype != torch.float32
        product = torch.mm(x_NI.T, x_NI, out_dtype=torch.float32) if half else x_NI.float().T @ x_NI.float()
        self.total = product if self.total is None else self.total.add_(product)
        self.tokens += len(x_NI)

    def mean(self) -> Tensor:
        """Return a new tensor: the solver works in place."""
        assert self.total is not None, "no token came"
        return self.total * (2 / self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """A layer's codes, with what the solver says: squared error per token, and the damping that it took."""

    packed: PackedLinear
    loss: float
    damp: float


def solve(weight_OI: Tensor, hessian: Hessian, spec: QuantSpec) -> Solved:
    """Choose codes for a weight that keep its outputs on the Hessian's inputs.

    Raises:
        CheckFailed: The loss is not a number.
    """
    quantization: Any = import_module("gptqmodel.quantization")
    config = import_module("gptqmodel").GPTQConfig(
        bits=spec.bits,
        group_size=spec.group_size,
        sym=spec.sym,
        desc_act=spec.desc_act,
        damp_percent=spec.damp_percent,
        mse=spec.mse,
        fallback=None,
        offload_to_disk=False,
    )
    out_features, in_features = weight_OI.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight_OI.float(), requires_grad=False)
    solver = quantization.GPTQ(linear, qcfg=config)
    solver.quantizer.configure(perchannel=True)
    solver.H, solver.nsamples = hessian.mean(), hessian.tokens
    solver.module_copy = linear.weight.data.clone()
    settle_dead_channels(solver.H, solver.module_copy)
    try:
        rounded_OI, scales_OG, zeros_OG, g_idx, _, loss, damp, _ = solver.quantize()
    except ValueError as error:
        if "NaN" not in str(error):
            raise
        raise CheckFailed(
            f"GPTQModel's solver stopped at a loss that is not a number: {error}",
            remedy="Look for NaN or infinite weights in the source; more calibration text does not cure them.",
        ) from error
    solver.free()
    form = gptq_format({"quantization_config": spec.quantization_config("")})
    return Solved(packed=pack(rounded_OI, scales_OG, zeros_OG, g_idx, form), loss=float(loss), damp=float(damp))


def pack(rounded_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor, g_idx: Tensor, form: GptqFormat) -> PackedLinear:
    """Return the codes of a weight that lies on its grid: ``weight = scale * (code - zero)``."""
    groups, highest = g_idx.long(), 2**form.bits - 1
    words: list[Tensor] = []
    for rows in range(0, len(rounded_OI), BLOCK_OUTPUTS):
        block = slice(rows, rows + BLOCK_OUTPUTS)
        codes_OI = (rounded_OI[block] / scales_OG[block][:, groups] + zeros_OG[block][:, groups]).round()
        words.append(pack_rows(codes_OI.clamp_(0, highest).int().T, form.bits))
    stored_OG = (zeros_OG.round().int() - form.stored_zero_offset) & highest
    return PackedLinear(
        format=form,
        qweight=torch.cat(words, dim=1),
        qzeros=pack_rows(stored_OG, form.bits).T.contiguous(),
        scales=scales_OG.T.contiguous().half(),
        g_idx=g_idx.int(),
    )
