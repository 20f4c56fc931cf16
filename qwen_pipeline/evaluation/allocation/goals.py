"""The limit that an allocation keeps."""

from dataclasses import dataclass
from typing import Literal

Measure = Literal["bytes", "bits", "kl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A limit: a size of all tensors in bytes, average bits of the linear layers' weights, or a divergence."""

    measure: Measure
    value: float
