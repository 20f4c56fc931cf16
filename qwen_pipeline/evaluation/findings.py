"""Everything that one validation found, in the form that is judged, drawn and written down."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from qwen_pipeline.evaluation.figures import ModelFigures
from qwen_pipeline.evaluation.samples import Sample
from qwen_pipeline.evaluation.serving.findings import ServingFindings
from qwen_pipeline.evaluation.tasks.plan import Score
from qwen_pipeline.qwen.tensor_parallel.feasibility import DegreeFeasibility

if TYPE_CHECKING:
    from qwen_pipeline.evaluation.structure.check import Structure
    from qwen_pipeline.evaluation.tensor_parallel.findings import TargetFindings

BASE, MERGED, PADDED, QUANTIZED = "base", "merged", "padded", "quantized"
UNPADDED_QUANTIZED = "quantized unpadded"
"""The merged model quantized without padding, to tell what padding cost."""
_ORIGINS = {
    MERGED: (BASE,),
    PADDED: (MERGED, BASE),
    QUANTIZED: (PADDED, MERGED, BASE),
    UNPADDED_QUANTIZED: (MERGED, BASE),
}
"""Role -> what it came from, the last step first."""
SIGNIFICANT_DIGITS = 6
"""What is written down: beyond them floating-point sums depend on the number of threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """One validation.

    Attributes:
        structure: The quantized checkpoint against the one it was made from.
        models: Role -> figures, in the order in which the models come to be; base, padded and unpadded may be
            absent.
        nbytes: Role -> bytes of its tensors.
        samples: What the merged and the quantized model answer.
        parallel: What the asked-for tensor-parallel degree means; None where the group size is not known.
        targets: What each engine that the checkpoint is declared for makes of it; empty where that is not known.
        served: What a real serving engine made of the checkpoints; empty where none is configured.
        tasks: Scores in benchmark tasks; empty where none are configured.
        tasks_fault: Why configured tasks have no scores.
    """

    structure: "Structure"
    models: Mapping[str, ModelFigures]
    nbytes: Mapping[str, int]
    samples: Sequence[Sample]
    parallel: DegreeFeasibility | None
    targets: "Sequence[TargetFindings]" = ()
    served: Sequence[ServingFindings] = ()
    tasks: Sequence[Score] = ()
    tasks_fault: str | None = None

    def perplexity(self, role: str) -> float | None:
        """Return a model's perplexity, or None if it is absent or did not load."""
        return self.models[role].perplexity if role in self.models else None

    def perplexity_ratio(self, role: str, to: str) -> float | None:
        """Return one model's perplexity over another's, or None if one of them is not known."""
        above, below = self.perplexity(role), self.perplexity(to)
        return above / below if above and below else None

    @property
    def padding_cost(self) -> float | None:
        """KL(merged || quantized) over that of the model quantized without padding; None if one is not known."""
        both = [
            self.models[role].divergence if role in self.models else None for role in (QUANTIZED, UNPADDED_QUANTIZED)
        ]
        padded, unpadded = (divergence.mean if divergence else None for divergence in both)
        return padded / unpadded if padded and unpadded else None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, floats rounded to :data:`SIGNIFICANT_DIGITS`."""
        return rounded(asdict(self))


def origin_of(role: str, models: Mapping[str, ModelFigures]) -> str | None:
    """Return the role of the model that another was made from, among those whose perplexity is known."""
    return next((each for each in _ORIGINS.get(role, ()) if each in models and models[each].perplexity), None)


def rounded(value: Any) -> Any:
    """Round every float in a JSON value to :data:`SIGNIFICANT_DIGITS`; what is not finite becomes its name."""
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value
