"""Products of float32 matrices as fast as a GPU's tensor cores allow."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor

LOW_BITS = 2**13 - 1
"""Bits of a float32 that TF32, the format that tensor cores take, does not have."""


def float_product(left_IN: Tensor, right_NJ: Tensor) -> Tensor:
    """Return the product of float32 matrices, right to six digits.

    A GPU multiplies TF32, which has ten bits behind the point, eight times as fast as float32. A number is the sum of
    two of them but for its last bits; three of the four products of these matter.
    """
    if left_IN.device.type != "cuda":
        return left_IN @ right_NJ
    (left_high, left_low), (right_high, right_low) = _split(left_IN), _split(right_NJ)
    with _tensor_cores():
        return (left_low @ right_high).add_(left_high @ right_low).add_(left_high @ right_high)


def _split(matrix: Tensor) -> tuple[Tensor, Tensor]:
    high = (matrix.view(torch.int32) & ~LOW_BITS).view(torch.float32)
    return high, matrix - high


@contextmanager
def _tensor_cores() -> Generator[None]:
    """Let a GPU take TF32 for float32."""
    allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
