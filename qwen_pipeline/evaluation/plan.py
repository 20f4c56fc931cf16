"""The inputs of a validation, and the plan of its measurements and limits."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qwen_pipeline.evaluation.behaviour.plan import DEFAULT_BEHAVIOUR, BehaviourPlan
from qwen_pipeline.evaluation.findings import BASE, MERGED, MERGED_OTHERWISE, PADDED, QUANTIZED, UNPADDED_QUANTIZED
from qwen_pipeline.evaluation.limits import DEFAULT_LIMITS, Limits
from qwen_pipeline.evaluation.samples import DEFAULT_PROMPTS
from qwen_pipeline.evaluation.serving.findings import ServingPlan
from qwen_pipeline.evaluation.tasks.plan import TaskPlan
from qwen_pipeline.evaluation.tensor_parallel.findings import Target
from qwen_pipeline.text.spec import DEFAULT_TEXT_SPEC, TextSpec

INPUT_OF_ROLE = {
    BASE: "base", MERGED: "reference", MERGED_OTHERWISE: "other_merge", PADDED: "padded", QUANTIZED: "candidate",
    UNPADDED_QUANTIZED: "unpadded",
}  # fmt: skip
"""Role -> the field of :class:`ValidationInputs`, which is also its name in the derivation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationInputs:
    """The directories and the text that a validation reads.

    Attributes:
        reference: The merged full-precision checkpoint, stored or as a recipe.
        candidate: The quantized checkpoint.
        text: Held-out text: a file of records or a directory, see :mod:`qwen_pipeline.text.sources`.
        base: The checkpoint that was fine-tuned, to measure the effect of fine-tuning.
        other_merge: The merge of the same fine-tune onto the same base read otherwise, to compare the two: after QLoRA,
            onto the base in full precision and as it was rounded in training.
        padded: The padded checkpoint, if the candidate is wider than the reference. Without it, a candidate that was
            made elsewhere is compared with the reference padded by zeros, and the effect of padding on predictions is
            not measured. The channels that a repair added are read from the candidate's manifest.
        unpadded: The reference quantized like the candidate but without padding, to measure the cost of padding.
        calibration: The output of the stage ``calibration`` that the candidate was quantized on. Activations are
            then also measured on its tokens, on as many windows as of held-out text.
        before: The previous quantized version, whose losses are plotted with those of the candidate.
    """

    reference: Path
    candidate: Path
    text: Path
    base: Path | None = None
    other_merge: Path | None = None
    padded: Path | None = None
    unpadded: Path | None = None
    calibration: Path | None = None
    before: Path | None = None

    @property
    def models(self) -> dict[str, Path]:
        """Role -> resolved directory of each model that was given."""
        roots: dict[str, Path | None] = {role: getattr(self, name) for role, name in INPUT_OF_ROLE.items()}
        return {role: root.resolve() for role, root in roots.items() if root}


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationPlan:
    """The measurements of a validation, and the limits that its checks apply.

    Attributes:
        tensor_parallel: Number of ranks that will serve the candidate.
        targets: Engines and numbers of ranks that will serve it; by default any engine, which only shards it evenly
            among ``tensor_parallel`` ranks.
        limits: The thresholds of the checks.
        prompts: Prompts that the merged and the quantized model answer side by side.
        behaviour: Further requests that both answer, and whose answers a program has to be able to read.
        windows: Maximum number of windows of text.
        seq_len: Tokens in a window.
        text_spec: The share of records of the text that may be skipped, and arguments of the chat template, which
            formats the prompts too.
        serving: The checkpoints to serve with a real engine, and the engine; by default none.
        tasks: The benchmark tasks to run, and the limits of their scores; by default none.
        device: The device that computes predictions; by default a GPU if there is one.
    """

    tensor_parallel: int = 1
    targets: Sequence[Target] = ()
    limits: Limits = DEFAULT_LIMITS
    prompts: Sequence[str] = DEFAULT_PROMPTS
    behaviour: BehaviourPlan = DEFAULT_BEHAVIOUR
    windows: int = 8
    seq_len: int = 512
    text_spec: TextSpec = DEFAULT_TEXT_SPEC
    serving: ServingPlan | None = None
    tasks: TaskPlan | None = None
    device: Literal["cpu", "cuda"] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the settings that affect the report, for the identity of a validation."""
        return {
            "limits": asdict(self.limits),
            "behaviour": self.behaviour.to_json(),
            "device": self.device,
            "prompts": list(self.prompts),
            "serving": self.serving.to_json() if self.serving else None,
            "tasks": self.tasks.to_json() if self.tasks else None,
            "seq_len": self.seq_len,
            "text": self.text_spec.to_json(),
            "targets": [str(target) for target in self.targets],
            "tensor_parallel": self.tensor_parallel,
            "windows": self.windows,
        }


DEFAULT_PLAN = ValidationPlan()
