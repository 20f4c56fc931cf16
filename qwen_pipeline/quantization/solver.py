"""GPTQModel's solver, called directly with a Hessian computed here; no other module depends on its interface.

The interface changes between releases, so the parts used here have contract tests (``quantization/test_solver.py``).
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from qwen_pipeline.errors import CheckFailed
from qwen_pipeline.quantization.dead_channels import settle_dead_channels
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.transforms.codes.gptq import GptqFormat, PackedLinear, gptq_format, pack_rows, unpack_rows
from qwen_pipeline.transforms.codes.parts import WORD_BITS, word_of

BLOCK_INPUTS = {"cpu": 256, "cuda": 2048}
"""Rows of a Hessian that are summed at a time, by device; each block covers only the columns from its diagonal on.

A GPU is efficient with large products; on a CPU smaller ones are as fast, and less is computed twice.
"""

BLOCK_OUTPUTS = 1024
"""Outputs whose codes are packed or counted at a time."""


@dataclass(slots=True)
class Hessian:
    """Running sum of ``x x^T`` over N tokens [I, I], float32; its mean is ``2 / N * sum x x^T``."""

    inputs: int
    total: Tensor | None = None
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        """Add inputs [..., I].

        On a GPU 16-bit inputs are multiplied in their own dtype and summed in float32: the products are exact in
        float32, and this is twelve times as fast as a product of float32 inputs.
        """
        x_NI = x.flatten(0, -2)
        if self.total is None:
            self.total = torch.zeros(self.inputs, self.inputs, device=x.device)
        block = BLOCK_INPUTS[x.device.type]
        for start in range(0, self.inputs, block):
            rows = slice(start, start + block)
            self.total[rows, start:] += product(x_NI[:, rows].T, x_NI[:, start:])
        self.tokens += len(x_NI)

    def pop_mean(self) -> Tensor:
        """Return the mean and release the sum; the caller owns the memory. Without tokens, the mean is the identity."""
        mean_II, self.total = self.total, None
        if mean_II is None:
            return torch.eye(self.inputs)
        block = BLOCK_INPUTS[mean_II.device.type]
        for start in range(block, self.inputs, block):
            above = slice(start - block, start)
            mean_II[start:, above] = mean_II[above, start:].T
        return mean_II.mul_(2 / self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """The codes of a linear layer, and their figures.

    Attributes:
        loss: Squared output error per token, as estimated by the solver.
        damp: Share of the mean Hessian diagonal that was added.
        zero_groups: Groups whose weights are all zero.
        saturated_groups: Groups with at least a quarter of their codes at the ends of the grid.
        target: The weight that was about to be rounded in each column, if a later step of the recipe needs it.
        errors: Errors after the steps of a recipe, by the names that :class:`ModuleEvidence` has for them.
    """

    packed: PackedLinear
    loss: float
    damp: float
    zero_groups: int
    saturated_groups: int
    target: Tensor | None = None
    errors: Mapping[str, Any] = field(default_factory=dict[str, Any])


def solve(weights: Mapping[str, Tensor], hessian: Hessian, spec: QuantSpec) -> Iterator[Solved]:
    """Yield codes for the weights [O, I] of modules that share their inputs, chosen to preserve the modules' outputs.

    The Hessian is consumed. Its inverse is factored once, and once more for each damping that a module overrides.

    Raises:
        CheckFailed: A loss is NaN.
    """
    factors = import_module("gptqmodel.quantization.gptq").SharedHessianFactorCache(0, "weights that share inputs")
    tokens, form = hessian.tokens, gptq_format({"quantization_config": spec.quantization_config("")})
    means = [hessian.pop_mean()]
    for number, (module, weight_OI) in enumerate(weights.items(), start=1):
        solver = _solver(weight_OI, replace(spec, **spec.override(module)))
        solver.attach_shared_hessian_cache(factors)
        mean_II = means.pop()
        means += [mean_II.clone()] if number < len(weights) else []
        solver.H, solver.nsamples = mean_II.to(weight_OI.device), tokens
        del mean_II
        settle_dead_channels(solver.H, solver.module_copy)
        with nan_as_check_failed():
            rounded_OI, scales_OG, zeros_OG, g_idx, _, loss, damp, _ = solver.quantize()
        solver.free()
        packed = pack(rounded_OI, scales_OG, zeros_OG, g_idx, form)
        zero, saturated = zero_and_saturated_groups(packed)
        yield Solved(packed=packed, loss=float(loss), damp=float(damp), zero_groups=zero, saturated_groups=saturated)


@contextmanager
def nan_as_check_failed() -> Generator[None]:
    """Translate the solver's error about a NaN loss.

    Raises:
        CheckFailed: A loss is NaN.
    """
    try:
        yield
    except ValueError as error:
        if "NaN" not in str(error):
            raise
        raise CheckFailed(
            f"GPTQModel's solver stopped because a loss is NaN: {error}",
            remedy="Look for NaN or infinite weights in the source; more calibration text does not help.",
        ) from error


def product(x_IN: Tensor, x_NJ: Tensor) -> Tensor:
    if x_IN.device.type == "cuda" and x_IN.dtype != torch.float32:
        return torch.mm(x_IN, x_NJ, out_dtype=torch.float32)
    return x_IN.float() @ x_NJ.float()


def _solver(weight_OI: Tensor, spec: QuantSpec) -> Any:
    """Return GPTQModel's solver for a copy of the weight."""
    config = import_module("gptqmodel").GPTQConfig(
        bits=spec.bits,
        group_size=spec.group_size,
        sym=spec.sym,
        desc_act=spec.desc_act,
        act_group_aware=spec.act_group_aware and not spec.desc_act,
        damp_percent=spec.damp_percent,
        mse=spec.mse,
        fallback=None,
        offload_to_disk=False,
    )
    out_features, in_features = weight_OI.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight_OI.float(), requires_grad=False)
    solver = import_module("gptqmodel.quantization").GPTQ(linear, qcfg=config)
    solver.quantizer.configure(perchannel=True)
    solver.module_copy = linear.weight.data.clone()
    return solver


def pack(rounded_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor, g_idx: Tensor, form: GptqFormat) -> PackedLinear:
    """Return the codes of a weight that is on its grid: ``weight = scale * (code - zero)``."""
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


def zero_and_saturated_groups(packed: PackedLinear) -> tuple[int, int]:
    """Count the groups of zeros, and the groups with at least a quarter of their codes at the ends of the grid.

    All codes of a 32-bit word are tested together: a code is at an end of the grid if all its bits are equal.
    """
    bits, per_word, size = packed.format.bits, packed.format.codes_per_word, packed.format.group_size
    highest, middle = 2**bits - 1, 2 ** (bits - 1)
    ones, middles, below = (word_of(code, bits) for code in (1, middle, middle - 1))
    words = packed.qweight
    if not packed.is_in_order:
        words = pack_rows(unpack_rows(words, bits)[packed.g_idx.argsort(stable=True)], bits)
    zero, saturated = 0, 0
    for start in range(0, words.shape[1], BLOCK_OUTPUTS):
        stop = min(start + BLOCK_OUTPUTS, words.shape[1])
        words_GWO = words[:, start:stop].unflatten(0, (-1, size // per_word))
        zeros_GO = packed.zeros(start, stop) * ones
        zero += int(((words_GWO.amin(dim=1) == zeros_GO) & (words_GWO.amax(dim=1) == zeros_GO)).sum())
        between_GWO = (((words_GWO ^ words_GWO >> 1) & below) + below & middles) >> (bits - 1) & ones
        between_GO = (between_GWO * ones >> (WORD_BITS - bits) & highest).sum(dim=1, dtype=torch.int32)
        saturated += int(((size - between_GO) * 4 >= size).sum())
    return zero, saturated
