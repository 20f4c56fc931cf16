"""What the worker is asked to measure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

MEASURE = "qwen_pipeline.evaluation.worker:measure"
MEASURING_ENVIRONMENT = {"GPTQ_TORCH_CACHE_WEIGHTS": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
"""For the worker's process: unpack codes once instead of in every forward, compile nothing for that, ask no hub."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Models, and what to ask of each.

    Attributes:
        models: Role -> directory.
        reference: The role that the others are compared with.
        compared: Roles whose every prediction is compared with the reference's.
        answering: Roles that answer the prompts.
        windows: Token ids; every token but the first of each window is predicted.
        prompts: Token ids of each prompt.
        device: Where predictions are computed, in float32: ``cpu`` or ``cuda``.
        calibration: Token ids that the quantized model was quantized on, of one length: only its activations are
            looked at.
        cuts: Ways in which ranks share the quantized model that change its weights
            (:mod:`~qwen_pipeline.evaluation.tensor_parallel.simulate`); each is compared with the whole on one window.
    """

    models: Mapping[str, str]
    reference: str
    compared: Sequence[str]
    answering: Sequence[str]
    windows: Sequence[Sequence[int]]
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    device: str
    calibration: Sequence[Sequence[int]] = ()
    cuts: Sequence[tuple[int, Sequence[str]]] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Measurement":
        return cls(**value)


def sharding_role(number: int) -> str:
    """Return the role under which the worker reports a cut of :attr:`Measurement.cuts`."""
    return f"cut {number}"
