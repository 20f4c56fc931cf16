"""The findings of one validation, from which checks, plots and reports are made."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any

from qwen_pipeline.evaluation.behaviour.findings import Behaviour
from qwen_pipeline.evaluation.figures import ModelFigures
from qwen_pipeline.evaluation.heads import HeadTask
from qwen_pipeline.evaluation.samples import Sample
from qwen_pipeline.evaluation.serving.findings import ServingFindings
from qwen_pipeline.evaluation.tasks.plan import Score
from qwen_pipeline.qwen.tensor_parallel.feasibility import DegreeFeasibility

if TYPE_CHECKING:
    from qwen_pipeline.evaluation.structure.check import Structure
    from qwen_pipeline.evaluation.tensor_parallel.findings import TargetFindings

BASE, MERGED, PADDED, QUANTIZED = "base", "merged", "padded", "quantized"
UNPADDED_QUANTIZED = "quantized unpadded"
"""The merged model quantized without padding, to measure the cost of padding."""
MERGED_OTHERWISE = "merged otherwise"
"""The same fine-tune, merged onto the base read in another way: after QLoRA, rounded as in training or not."""
_ORIGINS = {
    MERGED: (BASE,),
    MERGED_OTHERWISE: (BASE,),
    PADDED: (MERGED, BASE),
    QUANTIZED: (PADDED, MERGED, BASE),
    UNPADDED_QUANTIZED: (MERGED, BASE),
}
"""Role -> the roles that it was made from, the latest first."""
SIGNIFICANT_DIGITS = 6
"""Precision of stored floats: further digits of a sum depend on the number of threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """The findings of one validation.

    Attributes:
        structure: Comparison of the quantized checkpoint with the one it was made from.
        models: Role -> figures, in the order of the stages; base, padded and quantized unpadded may be absent.
        nbytes: Role -> size of its tensors in bytes.
        samples: Answers of the merged and the quantized model.
        parallel: Feasibility of the requested tensor-parallel degree; None if the group size is unknown.
        targets: Findings for each target engine; empty if the group size is unknown.
        served: Findings of a real serving engine; empty if none is configured.
        tasks: Scores in benchmark tasks; empty if none are configured.
        tasks_fault: The reason why configured tasks have no scores.
        task: The task of the models.
        behaviour: Answers to requests whose form a program relies on.
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
    task: HeadTask = field(default_factory=HeadTask)
    behaviour: Behaviour = field(default_factory=Behaviour)

    def perplexity(self, role: str) -> float | None:
        """Return a model's perplexity, or None if it is absent or did not load."""
        return self.models[role].perplexity if role in self.models else None

    def perplexity_ratio(self, role: str, to: str) -> float | None:
        """Return the ratio of two models' perplexities, or None if one of them is unknown."""
        above, below = self.perplexity(role), self.perplexity(to)
        return above / below if above and below else None

    @property
    def padding_cost(self) -> float | None:
        """KL(merged || quantized) divided by that of the model quantized without padding; None if one is unknown."""
        both = [
            self.models[role].divergence if role in self.models else None for role in (QUANTIZED, UNPADDED_QUANTIZED)
        ]
        padded, unpadded = (divergence.mean if divergence else None for divergence in both)
        return padded / unpadded if padded and unpadded else None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, floats rounded to :data:`SIGNIFICANT_DIGITS`."""
        return rounded(asdict(self))


def origin_of(role: str, models: Mapping[str, ModelFigures]) -> str | None:
    """Return the latest role, among those with a known perplexity, that a model was made from."""
    return next((each for each in _ORIGINS.get(role, ()) if each in models and models[each].perplexity), None)


def rounded(value: Any) -> Any:
    """Round every float in a JSON value to :data:`SIGNIFICANT_DIGITS`; replace those that are not finite with text."""
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value
