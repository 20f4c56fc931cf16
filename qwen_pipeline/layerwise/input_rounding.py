"""Rounding of the inputs of linear layers to 8-bit floats, as engines do for weights of 8-bit floats (W8A8, dynamic).

An engine computes a scale for each token, or for each block of a token's inputs, from the largest magnitude, and rounds
the inputs to 8-bit floats. The product is then that of the rounded inputs and the dequantized weight, which is
computed here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_FLOAT = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FLOAT).max


@dataclass(frozen=True, slots=True)
class InputRounding:
    """The rounding of a layer's inputs to 8-bit floats.

    Attributes:
        per_scale: Consecutive inputs of a token that share a scale; None for all of them.
    """

    per_scale: int | None

    def round(self, inputs: Tensor) -> Tensor:
        """Return inputs [..., I] after rounding, in their own dtype.

        As in vLLM's ``per_token_group_quant_fp8`` and compressed-tensors' dynamic scales; zeros stay zero.
        """
        grouped = inputs.float().unflatten(-1, (-1, self.per_scale or inputs.shape[-1]))
        scales = grouped.abs().amax(dim=-1, keepdim=True) / _LARGEST
        scales = torch.where(scales == 0, torch.finfo(torch.float32).eps, scales)
        rounded = (grouped / scales).clamp(-_LARGEST, _LARGEST).to(_FLOAT).float() * scales
        return rounded.flatten(-2).to(inputs.dtype)


def with_rounded_inputs(layer: nn.Module, roundings: Mapping[str, InputRounding]) -> nn.Module:
    """Let a decoder layer round the inputs of its linear layers of 8-bit floats; ``roundings`` are by parameter.

    A layer is recognized by the memory of its weight: experts multiply by parts of one parameter.
    """
    if roundings:
        parameters = dict(layer.named_parameters())
        by_memory = {parameters[name].untyped_storage().data_ptr(): each for name, each in roundings.items()}
        compute = layer.forward

        def forward(*arguments: Any, **named: Any) -> Any:
            with _RoundedInputs(by_memory):
                return compute(*arguments, **named)

        layer.forward = forward
    return layer


class _RoundedInputs(TorchFunctionMode):
    """Rounds the first argument of products with some weights."""

    def __init__(self, by_memory: Mapping[int, InputRounding]) -> None:
        super().__init__()
        self._by_memory = by_memory

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        del types
        if func in _PRODUCTS and (rounding := self._by_memory.get(args[1].untyped_storage().data_ptr())):
            args = (rounding.round(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


_PRODUCTS = frozenset(
    product
    for product in (
        functional.linear,
        getattr(functional, "grouped_mm", None),
        getattr(torch, "_grouped_mm", None),
        torch.bmm,
    )
    if product
)
"""The functions with which Transformers multiplies inputs by weights, those of experts included."""
