"""The model of all settings, and values derived from several of them."""

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
from qwen_pipeline.evaluation.plan import ValidationPlan
from qwen_pipeline.evaluation.serving.findings import ServerEngine, ServingPlan
from qwen_pipeline.evaluation.tasks.plan import TaskPlan
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.text.spec import TextSpec
from qwen_pipeline.transforms.codes.base_weights import BaseWeights
from qwen_pipeline.transforms.codes.nf4 import Statistics
from qwen_pipeline.workers.environments import find_environment


class Settings(BaseSettings):
    """The content of ``qwen_pipeline.toml``.

    Attributes:
        workspace: Root of all files that the pipeline writes.
        inbox: Directory into which fine-tunes are uploaded, one subdirectory each; by default ``<workspace>/inbox``.
        imports: The same for checkpoints quantized elsewhere; by default ``<workspace>/imports``.
        base_model: Directory or hub id of the full-precision base model.
        base_revision: Commit, tag or branch of a base model on the hub.
        base_names: Other names by which adapters may refer to the base model, or patterns of names with ``*``.
        base_dequantize: Whether a quantized base is read as the full precision that its codes stand for.
        base_nf4: Whether merging starts from the base as QLoRA rounds it: ``single`` or, with double quantization,
            ``double``.
        leave_behind: Patterns of paths of weights beside a fine-tune's own that were not trained.
        padding: Target geometry of the padded checkpoint.
        quantization: Settings of the quantizer.
        calibration: Calibration text: a source, or a section.
        validation: Held-out text, limits and further measurements.
        engines: Name of an engine -> its Python environment.
        store: Storage of intermediate checkpoints.
        owners: Owners of the assets in Dagster: ``team:name`` or an e-mail address.
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
    base_dequantize: bool = False
    base_nf4: Statistics | None = None
    leave_behind: tuple[str, ...] = ()
    padding: Padding = Field(default_factory=Padding)
    quantization: QuantSpec = Field(default_factory=QuantSpec)
    calibration: Calibration = Field(default_factory=Calibration)
    validation: Validation = Field(default_factory=Validation)
    store: Store = Field(default_factory=Store)
    engines: Mapping[str, Engine] = Field(default_factory=dict[str, Engine])
    owners: tuple[str, ...] = ()

    @field_validator("store")
    @classmethod
    def _require_merged_weights_for_unpadded(cls, store: Store, known: ValidationInfo) -> Store:
        validation = known.data.get("validation")
        if validation and validation.unpadded and not store.merged:
            raise ValueError("validation.unpadded quantizes the merged weights, but store.merged is false")
        return store

    @property
    def store_root(self) -> Path:
        return self.workspace / "store"

    @property
    def base_weights(self) -> BaseWeights:
        """The way to read the base model."""
        return BaseWeights(dequantize=self.base_dequantize, nf4=self.base_nf4)

    @property
    def padding_spec(self) -> PaddingSpec:
        return self.padding.spec(self.quantization.group_size)

    @property
    def dagster_home(self) -> Path:
        return self.workspace / "dagster_home"

    def engine_python(self, name: str | None = None) -> Path | None:
        """Return the interpreter configured for an engine, by default the quantizer; None selects the installed one."""
        return self.engines.get(name or self.quantization.environment, Engine()).python

    def serving_plan(self, engine: ServerEngine | None = None, degrees: tuple[int, ...] = ()) -> ServingPlan | None:
        """Return the plan for serving checkpoints, or None if no serving engine is given or configured.

        Raises:
            EnvironmentFault: The engine is not installed.
        """
        serve = self.validation.serve
        if (name := engine or serve.engine) is None:
            return None
        environment = find_environment(name, self.engine_python(name))
        return ServingPlan(
            engine=name,
            python=environment.python,
            versions=environment.versions(),
            degrees=degrees or serve.tensor_parallel or tuple(self.padding_spec.degrees),
            models=serve.models,
            ready_seconds=serve.ready_seconds,
            arguments=serve.arguments,
        )

    def task_plan(self) -> TaskPlan | None:
        """Return the plan for running benchmark tasks, or None if no tasks are configured.

        Raises:
            EnvironmentFault: lm-eval is not installed.
        """
        lm_eval = self.validation.lm_eval
        if not lm_eval.tasks:
            return None
        environment = find_environment("lm-eval", self.engine_python("lm-eval"))
        return TaskPlan(python=environment.python, versions=environment.versions(), **dict(lm_eval))

    def validation_plan(self, fine_tune: str | None, *, serving: ServingPlan | None) -> ValidationPlan:
        """Return the plan of a fine-tune's validation; if ``fine_tune`` is None, the general limits apply.

        Raises:
            EnvironmentFault: lm-eval is not installed.
        """
        validation, arguments = self.validation, self.validation.template_arguments
        return ValidationPlan(
            tensor_parallel=self.padding.tensor_parallel,
            targets=validation.declared or self.padding.declared,
            limits=validation.limits_of(fine_tune),
            prompts=validation.prompts,
            windows=validation.windows,
            seq_len=validation.seq_len,
            text_spec=TextSpec(
                max_skipped=validation.max_skipped,
                template_arguments=self.calibration.template_arguments if arguments is None else arguments,
            ),
            serving=serving,
            tasks=self.task_plan(),
        )

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
