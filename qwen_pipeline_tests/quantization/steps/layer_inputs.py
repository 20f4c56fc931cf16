"""A linear layer with correlated inputs, in the full-precision model and in the quantized one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_pipeline.quantization.solver import Hessian
from qwen_pipeline.quantization.steps.gptq import InverseFactor, factored, group_aware_order
from qwen_pipeline.quantization.steps.target_correction import InputError

OUT, IN, TOKENS, GROUP_SIZE = 96, 128, 512, 32
DAMP = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInputs:
    """Inputs [N, I] and residual streams [N, O] of both models, and the weight [O, I] between them."""

    weight: Tensor
    full: Tensor
    quantized: Tensor
    residual_full: Tensor
    residual: Tensor

    def hessian(self) -> Hessian:
        hessian = Hessian(IN)
        hessian.add(self.quantized)
        return hessian

    def factor(self) -> InverseFactor:
        mean_II = self.hessian().pop_mean()
        return factored(mean_II, group_aware_order(mean_II.diagonal(), GROUP_SIZE), DAMP)

    def error(self, *, residual: bool = True, of_outputs: bool | None = None) -> InputError:
        error = InputError()
        for rows in torch.arange(TOKENS).split(100):
            if residual if of_outputs is None else of_outputs:
                residuals = (self.residual_full[rows], self.residual[rows]) if residual else ()
                error.add_outputs(self.weight, self.full[rows], self.quantized[rows], residuals)
            else:
                assert not residual
                error.add(full=self.full[rows], quantized=self.quantized[rows])
        return error


def layer_inputs(seed: int = 0) -> LayerInputs:
    """Return inputs with a few strong channels, as real activations have."""
    random = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    strength_I = torch.exp(0.7 * randn(IN))
    full = randn(TOKENS, IN) @ (torch.eye(IN) + 0.3 * randn(IN, IN)) * strength_I
    residual = randn(TOKENS, OUT)
    return LayerInputs(
        weight=randn(OUT, IN) * IN**-0.5,
        full=full,
        quantized=full + 0.1 * strength_I * randn(TOKENS, IN) + 0.05 * full.roll(1, dims=1),
        residual_full=residual,
        residual=residual + 0.2 * full[:, :OUT],
    )
