"""Whether numbers are numbers: tested on blocks that are in memory anyway, so that no check needs a second read."""

from math import isfinite
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def is_finite(tensor: "torch.Tensor") -> bool:
    """Return whether there is no NaN and no infinity, without a temporary of the tensor's size."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(isfinite(end.item()) for end in tensor.aminmax())
