"""The methods of quantization: GPTQ's integer codes, and 8-bit floats in the layouts that engines read.

This module imports nothing but errors: the command line's help and the settings show its names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qwen_pipeline.errors import InputRefused

Method = Literal["gptq", "fp8", "fp8-block", "fp8-dynamic"]
"""``gptq``, or a layout of 8-bit floats by the name that its field uses: ``fp8`` is Transformers' and Qwen's own,
``fp8-block`` and ``fp8-dynamic`` are llm-compressor's schemes FP8_BLOCK and FP8_DYNAMIC."""
Container = Literal["fp8", "compressed-tensors"]
"""The ``quant_method`` of a config."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Layout:
    """A layout of weights in 8-bit floats (E4M3), whose inputs engines round to 8-bit floats too, token by token.

    Attributes:
        container: The ``quant_method`` of the config.
        block: Outputs and inputs that share a scale, the same number of both; None is one scale for each output.
    """

    container: Container
    block: int | None

    @property
    def unit(self) -> int:
        """Channels that must not be divided between ranks.

        Without blocks it is the number of channels to which kernels align: vLLM's CUTLASS kernels and PyTorch's
        ``scaled_mm`` take multiples of 16.
        """
        return self.block or 16

    @property
    def scale(self) -> str:
        """The name of a layer's scales."""
        return "weight_scale_inv" if self.container == "fp8" else "weight_scale"

    @property
    def title(self) -> str:
        """The layout in words."""
        blocks = f"blocks of {self.block} x {self.block}" if self.block else "one scale for each output"
        return f"8-bit floats (E4M3), {blocks}"


FP8_LAYOUTS: Mapping[Method, Fp8Layout] = {
    "fp8": Fp8Layout(container="fp8", block=128),
    "fp8-block": Fp8Layout(container="compressed-tensors", block=128),
    "fp8-dynamic": Fp8Layout(container="compressed-tensors", block=None),
}


def method_of(layout: Fp8Layout) -> Method:
    return next(method for method, each in FP8_LAYOUTS.items() if each == layout)


def layout_of(method: Method) -> Fp8Layout:
    """Return the layout of a method of 8-bit floats.

    Raises:
        InputRefused: The method is ``gptq``.
    """
    if layout := FP8_LAYOUTS.get(method):
        return layout
    raise InputRefused(f"{method} has integer codes, not 8-bit floats.", remedy=f"Use {', '.join(FP8_LAYOUTS)}.")
