"""Targets corrected for what earlier quantized layers lost: QEP (arXiv:2504.09629), with the residual stream.

A linear layer should give ``W x_f`` for the inputs ``x_f`` of the full-precision model, but it meets the inputs ``x``
of the quantized one. The best weight for these is ``W + W (sum (x_f - x) x^T) (sum x x^T)^-1``, of which GPTQ then
rounds a mixture with ``W``. A layer that adds to the residual stream ``r`` can also make up for its error ``r_f - r``,
and so pay back what all layers before it lost.
"""

from dataclasses import dataclass

from torch import Tensor

from qwen_pipeline.quantization.recipes import TargetCorrection
from qwen_pipeline.quantization.solver import product
from qwen_pipeline.quantization.steps.gptq import InverseFactor


@dataclass(slots=True)
class InputError:
    """Running sums over N tokens of the error of a layer's inputs, and of the residual stream, times the inputs.

    Attributes:
        inputs: ``sum (x_f - x) x^T``, float32.
        residual: ``sum (r_f - r) x^T``, float32; None for a layer that does not add to the residual stream.
        tokens: N.
    """

    inputs: Tensor | None = None
    residual: Tensor | None = None
    tokens: int = 0

    def add(self, full: Tensor, quantized: Tensor) -> None:
        """Add inputs [N, I] of the full-precision model and of the quantized one, for the same tokens."""
        self.inputs = _plus(self.inputs, product((full - quantized).T, quantized))
        self.tokens += len(quantized)

    def add_residual(self, full: Tensor, quantized: Tensor, inputs: Tensor) -> None:
        """Add the residual streams [N, O] of both models, and the inputs [N, I] of the quantized one."""
        self.residual = _plus(self.residual, product((full - quantized).T, inputs))

    def of_outputs(self, rows: Tensor) -> "InputError":
        """Return the sums that concern some outputs."""
        residual = None if self.residual is None else self.residual[rows]
        return InputError(inputs=self.inputs, residual=residual, tokens=self.tokens)


def corrected(weight_OI: Tensor, error: InputError, factor: InverseFactor, correction: TargetCorrection) -> Tensor:
    """Return the weight that is nearest to the full-precision layer's outputs for the inputs of the quantized model.

    The Hessian is the mean of ``2 x x^T``, so the sums are scaled likewise.
    """
    if error.inputs is None:
        return weight_OI.float()
    cross_OI = weight_OI.float() @ error.inputs
    if error.residual is not None and correction.residual:
        cross_OI += error.residual
    order_I = factor.order
    change_OI = cross_OI[:, order_I] @ factor.upper.T @ factor.upper
    return weight_OI + (correction.strength * 2 / error.tokens) * change_OI[:, order_I.argsort()]


def _plus(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total.add_(term)
