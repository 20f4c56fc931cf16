"""The results of the worker, as sent between processes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

from qwen_pipeline.evaluation.figures import ModelFigures
from qwen_pipeline.evaluation.structure.check import Structure
from qwen_pipeline.evaluation.tensor_parallel.findings import ShardingFindings


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The results of a :class:`~qwen_pipeline.evaluation.measurement.Measurement`.

    Attributes:
        figures: Role -> figures.
        structure: Comparison of the quantized checkpoint with the one it was made from, if requested.
        shardings: The findings about each requested sharding; none if the config describes no codes.
        outputs: The reference's outputs for the first texts, if requested.
    """

    figures: Mapping[str, ModelFigures]
    structure: Structure | None = None
    shardings: Sequence[ShardingFindings] = ()
    outputs: Sequence[Sequence[float]] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)  # pydantic would write None for an infinite error

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Measured":
        return _MEASURED.validate_python(value)


_MEASURED = TypeAdapter(Measured)
