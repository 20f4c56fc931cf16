"""The largest activation of each layer: beyond 65504, the maximum of float16, engines answer ``!!!!``.

Every input and output of a layer's matrix products is measured. This includes the product of gate and up, which
overflows first, in dense MLPs and in experts, regardless of the names of a family's modules.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.evaluation.figures import Peak
from qwen_pipeline.layerwise.forward import LayerStream
from qwen_pipeline.layerwise.model import ComputeContext

_PRODUCTS = ("linear", "matmul", "mm", "bmm", "grouped_mm", "_grouped_mm", "grouped_mm_fallback")
UNNAMED = "a product of two activations"


class PeakStream(LayerStream):
    """A layer stream that records the largest activation of each layer in ``peaks``."""

    def __init__(
        self, checkpoint: Checkpoint, batches: Sequence[Tensor], context: ComputeContext, *, other_models: int = 0
    ) -> None:
        super().__init__(checkpoint, batches, context, other_models=other_models)
        self.peaks: list[Peak] = []

    def run(self, layer: int, module: nn.Module) -> None:
        """Run every batch through a layer."""
        names = {weight.untyped_storage().data_ptr(): name for name, weight in module.named_parameters()}
        with _Products(names) as products:
            super().run(layer, module)
        place, magnitude = products.largest
        self.peaks.append(Peak(layer=layer, place=place, magnitude=magnitude))


class _Products(TorchFunctionMode):
    """Record the largest magnitude that enters or leaves a matrix product, by the name of its weight."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names
        self._magnitudes: dict[str, Tensor] = {}

    @property
    def largest(self) -> tuple[str, float]:
        """The place and magnitude of the largest activation. NaN sorts highest, as in ``torch.argmax``."""
        magnitudes = {name: magnitude.item() for name, magnitude in self._magnitudes.items()}
        place = max(magnitudes, key=lambda name: (magnitudes[name] != magnitudes[name], magnitudes[name]))
        return place.removesuffix(".weight"), magnitudes[place]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _PRODUCTS:
            factors = [factor for factor in args[:2] if isinstance(factor, Tensor)]
            weights = [self._names.get(factor.untyped_storage().data_ptr()) for factor in factors]
            name = next(filter(None, weights), UNNAMED)
            for activation, weight in zip([*factors, result], [*weights, None], strict=True):
                self._update(name, None if weight else activation)
        return result

    def _update(self, name: str, activation: Tensor | None) -> None:
        if activation is not None and activation.numel():
            low, high = activation.aminmax()
            magnitude = torch.maximum(-low, high).float()
            self._magnitudes[name] = torch.maximum(self._magnitudes.get(name, magnitude), magnitude)
