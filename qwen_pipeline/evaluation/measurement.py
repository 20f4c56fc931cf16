"""The measurement as it is sent to the worker."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qwen_pipeline.evaluation.heads import HeadTask
from qwen_pipeline.evaluation.tensor_parallel.findings import Sharding

MEASURE = "qwen_pipeline.evaluation.worker:measure"
MEASURING_ENVIRONMENT = {"GPTQ_TORCH_CACHE_WEIGHTS": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
"""Environment of the worker process: unpack codes once instead of in every forward, compile nothing, stay offline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Models, and the measurements of each.

    Attributes:
        models: Role -> directory.
        reference: The role with which others are compared.
        compared: Roles whose predictions are compared with the reference's.
        answering: Roles that answer the prompts.
        windows: Token ids; every token but the first of each window is predicted.
        prompts: Token ids of each prompt.
        device: The device that computes predictions, in float32: ``cpu`` or ``cuda``.
        unruled: Whether models also answer without the rules of their generation configs, as a server does.
        requests: Token ids of further prompts, which the models of ``answering`` answer.
        request_limits: Maximum number of tokens of the answer to each of them.
        calibration: Windows of token ids, all of the same length, that calibrated the quantized model; only its
            activations are measured on them.
        structure: Whether the quantized model is compared with the weights that it was made from.
        equal: Tensors of both that are equal by their digests.
        shardings: Shardings of the quantized model to simulate with that comparison
            (:mod:`~qwen_pipeline.evaluation.tensor_parallel.simulate`); those that change weights are compared on one
            window with the model that is not sharded.
        task: The task of the reference; a model with another head is loaded, but not compared.
        outputs: The number of the reference's outputs that are returned, if its head is not a language model's.
    """

    models: Mapping[str, str]
    reference: str
    compared: Sequence[str]
    answering: Sequence[str]
    windows: Sequence[Sequence[int]]
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    device: str
    unruled: bool = False
    requests: Sequence[Sequence[int]] = ()
    request_limits: Sequence[int] = ()
    calibration: Sequence[Sequence[int]] = ()
    structure: bool = False
    equal: Sequence[str] = ()
    shardings: Sequence[Sharding] = ()
    task: HeadTask = field(default_factory=HeadTask)
    outputs: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Measurement":
        task = HeadTask.from_json(value.get("task") or {})
        fields: dict[str, Any] = {**value, "task": task, "shardings": [Sharding(**each) for each in value["shardings"]]}
        return cls(**fields)


def sharding_role(number: int) -> str:
    """Return the role under which the worker reports one of :attr:`Measurement.shardings`."""
    return f"sharding {number}"
