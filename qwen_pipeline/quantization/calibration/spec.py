"""Settings that determine the tokens on which a model is calibrated."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from qwen_pipeline.quantization.validators import require_at_least, require_choice

Packing = Literal["stream", "documents"]
MIN_EXPERT_TOKENS = 128
"""With fewer tokens than a group has inputs, the Hessian of those inputs is singular."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSpec:
    """Number, length and selection of the calibration windows.

    Attributes:
        samples: Number of windows of tokens.
        seq_len: Tokens per window.
        seed: Determines which records are drawn, and their order.
        packing: ``stream`` fills the windows with one record after another, ``documents`` gives each record windows of
            its own.
    """

    samples: int = 128
    seq_len: int = 2048
    seed: int = 42
    packing: Packing = "stream"

    def __post_init__(self) -> None:
        require_choice("packing", self.packing, get_args(Packing))
        for name in ("samples", "seq_len"):
            require_at_least(name, getattr(self, name), low=1)

    @classmethod
    def fields(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))
