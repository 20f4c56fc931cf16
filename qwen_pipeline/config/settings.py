"""All settings together, and what follows from several of them."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from qwen_pipeline.config.file import PREFIX, config_file
from qwen_pipeline.config.sections import Calibration, ConfiguredPath, Engine, Padding, Store, Validation
from qwen_pipeline.evaluation.serving.findings import ServerEngine, ServingPlan
from qwen_pipeline.evaluation.tasks.plan import TaskPlan
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.workers.environments import find_environment


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
    def padding_spec(self) -> PaddingSpec:
        return self.padding.spec(self.quantization.group_size)

    @property
    def dagster_home(self) -> Path:
        return self.workspace / "dagster_home"

    def engine_python(self, name: str | None = None) -> Path | None:
        """The interpreter configured for an engine, by default the quantization's; None: the one installed here."""
        return self.engines.get(name or self.quantization.environment, Engine()).python

    def serving_plan(self, engine: ServerEngine | None = None, degrees: tuple[int, ...] = ()) -> ServingPlan | None:
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
            degrees=degrees or serve.tensor_parallel or tuple(self.padding_spec.degrees),
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
