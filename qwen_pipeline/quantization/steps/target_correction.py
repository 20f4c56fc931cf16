"""Targets corrected for what earlier quantized layers lost: QEP (arXiv:2504.09629), with the residual stream.

A linear layer should give ``W x_f`` for the inputs ``x_f`` of the full-precision model, but it meets the inputs ``x``
of the quantized one. The best weight for these is ``W + W (sum (x_f - x) x^T) (sum x x^T)^-1``, of which GPTQ then
rounds a mixture with ``W``. A layer that adds to the residual stream ``r`` can also make up for its error ``r_f - r``,
and so pay back what all layers before it lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qwen_pipeline.quantization.recipes import TargetCorrection
from qwen_pipeline.quantization.solver import product
from qwen_pipeline.quantization.steps.gptq import InverseFactor
from qwen_pipeline.quantization.steps.products import float_product

COLUMNS = 2048
"""Columns of a triangular matrix that are multiplied at once."""


@dataclass(slots=True)
class InputError:
    """Running sum over N tokens of the error that codes have to make up for, times the inputs ``x`` that they meet.

    Attributes:
        inputs: ``sum (x_f - x) x^T`` [I, I], float32, which serves any number of weights.
        outputs: ``sum (W (x_f - x) + r_f - r) x^T`` [O, I], float32, instead: takes less work for one weight with fewer
            outputs than inputs, and has the residual stream ``r``, if the layer adds to it.
        tokens: N.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None
    tokens: int = 0

    def add(self, full: Tensor, quantized: Tensor) -> None:
        """Add inputs [N, I] of the full-precision model and of the quantized one, for the same tokens."""
        self.inputs = _plus(self.inputs, product((full - quantized).T, quantized))
        self.tokens += len(quantized)

    def add_outputs(self, weight_OI: Tensor, full: Tensor, quantized: Tensor, residuals: Sequence[Tensor] = ()) -> None:
        """Add inputs [N, I] of both models, and the residual streams [N, O] of both that their outputs are added to."""
        missing_NO = functional.linear(full - quantized, weight_OI)
        if residuals:
            missing_NO += residuals[0] - residuals[1]
        self.outputs = _plus(self.outputs, product(missing_NO.T, quantized))
        self.tokens += len(quantized)

    def of_outputs(self, rows: Tensor) -> "InputError":
        """Return the sum for some of the outputs."""
        outputs = None if self.outputs is None else self.outputs[rows]
        return InputError(inputs=self.inputs, outputs=outputs, tokens=self.tokens)


def corrected(weight_OI: Tensor, error: InputError, factor: InverseFactor, correction: TargetCorrection) -> Tensor:
    """Return the weight that is nearest to the full-precision layer's outputs for the inputs of the quantized model.

    The Hessian is the mean of ``2 x x^T``, so the sums are scaled likewise.
    """
    weight_OI = weight_OI.float()
    if error.outputs is not None:
        change_OI = _solved(error.outputs, factor)
    elif error.inputs is None:
        return weight_OI
    elif len(weight_OI) > len(error.inputs):
        change_OI = float_product(weight_OI, _solved(error.inputs, factor))
    else:
        change_OI = _solved(float_product(weight_OI, error.inputs), factor)
    return change_OI.mul_(correction.strength * 2 / error.tokens).add_(weight_OI)


def _solved(cross_RI: Tensor, factor: InverseFactor) -> Tensor:
    """Return rows multiplied by the inverse Hessian; zeros of the factor are left out, as far as whole blocks are."""
    upper_II, ordered_RI = factor.upper, cross_RI[:, factor.order]
    blocks = [slice(start, start + COLUMNS) for start in range(0, len(upper_II), COLUMNS)]
    half_RI = torch.empty_like(ordered_RI)
    for block in blocks:
        half_RI[:, block] = float_product(ordered_RI[:, block.start :], upper_II[block, block.start :].T)
    for block in blocks:
        ordered_RI[:, block] = float_product(half_RI[:, : block.stop], upper_II[: block.stop, block])
    return ordered_RI[:, factor.order.argsort()]


def _plus(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total.add_(term)
