"""The gain of each step of a recipe: the error that codes add to a linear layer's outputs after it.

GPTQ rounds each output on its own. So rounding some outputs once more, without the recipe's steps, shows what GPTQ
alone would have lost, with the same inputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen_pipeline.quantization.recipes import TargetCorrection
from qwen_pipeline.quantization.steps.gptq import InverseFactor, round_columns
from qwen_pipeline.quantization.steps.target_correction import InputError, corrected

SAMPLE = 32
"""Outputs of a weight that are rounded again."""


class StepErrors:
    """Errors of some outputs of stacked weights after each step.

    The error is the squared distance to the outputs of the best weight in full precision, which makes up for the error
    of the inputs and of the residual stream as far as a weight can; it is a share of the squares of the outputs.

    Args:
        weight_OI: The stacked weights.
        outputs: The number of outputs of each.
        hessian_II: Mean Hessian of the inputs.
        error: Error of the inputs.
        factor: Factor of the inverse Hessian.
    """

    def __init__(
        self, weight_OI: Tensor, outputs: Sequence[int], hessian_II: Tensor, error: InputError, factor: InverseFactor
    ) -> None:
        self._hessian, self._factor = hessian_II, factor
        starts = torch.tensor([0, *outputs]).cumsum(0).tolist()
        samples = [torch.arange(0, count, -(-count // SAMPLE)) for count in outputs]
        self._counts = [len(each) for each in samples]
        self.rows = torch.cat([at + each for at, each in zip(starts, samples, strict=False)]).to(weight_OI.device)
        self._weight = weight_OI[self.rows]
        self._best = corrected(self._weight, error.of_outputs(self.rows), factor, TargetCorrection(strength=1))

    def drop(self, dead_I: Tensor) -> None:
        """Leave out inputs that are always zero."""
        self._weight[:, dead_I] = 0
        self._best[:, dead_I] = 0

    def measured(self, target_OI: Tensor, rounded_OI: Tensor, *, bits: int, group_size: int) -> list[dict[str, float]]:
        """Return the errors of each weight: of GPTQ, of GPTQ with corrected targets, and of the codes.

        Args:
            target_OI: The corrected stacked weights.
            rounded_OI: The weights that the codes stand for.
            bits: Bits of a code.
            group_size: Columns of a group.
        """
        both_2RI = torch.cat([self._weight, target_OI[self.rows]])
        again = round_columns(both_2RI, self._factor, None, bits=bits, group_size=group_size).weight
        steps = {"gptq_error": again[: len(self.rows)], "corrected_error": again[len(self.rows) :]}
        steps["searched_error"] = rounded_OI[self.rows]
        squares = self._squares(self._weight)
        errors = {name: self._squares(self._best - weight_RI) for name, weight_RI in steps.items()}
        return [
            {name: error / square if square else 0.0 for name, error in zip(errors, each, strict=True)}
            for square, *each in zip(squares, *errors.values(), strict=True)
        ]

    def _squares(self, weight_RI: Tensor) -> list[float]:
        """Return the mean square of the outputs of each weight."""
        squares_R = ((weight_RI @ self._hessian) * weight_RI).sum(dim=1)
        return [part.double().sum().item() for part in squares_R.split(self._counts)]
