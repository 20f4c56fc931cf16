"""The model of all settings, and values derived from several of them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from qwen_pipeline.checkpoint.files import load_toml
from qwen_pipeline.config.assets import Assets, Costs
from qwen_pipeline.config.execution import Execution, unpinned
from qwen_pipeline.config.file import PREFIX, config_file
from qwen_pipeline.config.notify import Notify
from qwen_pipeline.config.openlineage import OpenLineage
from qwen_pipeline.config.queue import Queue
from qwen_pipeline.config.recipes import Base, Name, Recipe
from qwen_pipeline.config.sections import (
    Calibration,
    ConfiguredPath,
    Engine,
    Owner,
    Padding,
    Validation,
)
from qwen_pipeline.config.storage import Release, Signing, Store
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.evaluation.plan import ValidationPlan
from qwen_pipeline.evaluation.serving.findings import ServerEngine, ServingPlan
from qwen_pipeline.evaluation.tasks.plan import TaskPlan
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.text.spec import TextSpec
from qwen_pipeline.transforms.codes.base_weights import BaseWeights
from qwen_pipeline.transforms.codes.nf4 import Statistics
from qwen_pipeline.workers.environments import find_environment

OF_BASE = ("base_model", "base_revision", "base_names", "base_dequantize", "base_nf4", "text_only")
"""The settings at the top level that describe the only base."""


class _SettingsFile(TomlConfigSettingsSource):
    """The settings file, read with bounds."""

    def _read_file(self, file_path: Any) -> dict[str, Any]:
        return load_toml(file_path)


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
        text_only: Whether of a composite model only the language model is merged and released.
        leave_behind: Patterns of paths of weights beside a fine-tune's own that were not trained.
        bases: Name -> a base model, if there are several; in place of ``base_model`` and the settings beside it.
        recipes: Name -> settings of some fine-tunes, in place of those at the top level.
        default_recipes: Recipes of fine-tunes that no recipe matches; ``default`` is the settings at the top level.
        uploads_choose_recipes: Whether a file ``recipe.toml`` in an upload may name recipes, in place of those that
            match.
        padding: Target geometry of the padded checkpoint.
        quantization: Settings of the quantizer.
        calibration: Calibration text: a source, or a section.
        validation: Held-out text, limits and further measurements.
        engines: Name of an engine -> its Python environment.
        signing: Signing of releases.
        notify: Notifications of failures, warnings, releases and a full disk.
        openlineage: Events for a data catalogue.
        release: Approval, promotion and delivery of releases.
        store: Storage of checkpoints, and retention.
        queue: Order and condition of the start of runs.
        execution: The place where steps run.
        costs: Prices of machines and GPUs.
        assets: Freshness, automation and code links of the assets in Dagster.
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
    text_only: bool = False
    leave_behind: tuple[str, ...] = ()
    bases: Mapping[Name, Base] = Field(default_factory=dict[str, Base])
    recipes: Mapping[Name, Recipe] = Field(default_factory=dict[str, Recipe])
    default_recipes: tuple[str, ...] = ()
    uploads_choose_recipes: bool = False
    padding: Padding = Field(default_factory=Padding)
    quantization: QuantSpec = Field(default_factory=QuantSpec)
    calibration: Calibration = Field(default_factory=Calibration)
    validation: Validation = Field(default_factory=Validation)
    store: Store = Field(default_factory=Store)
    engines: Mapping[str, Engine] = Field(default_factory=dict[str, Engine])
    signing: Signing = Field(default_factory=Signing)
    notify: Notify = Field(default_factory=Notify)
    openlineage: OpenLineage = Field(default_factory=OpenLineage)
    release: Release = Field(default_factory=Release)
    queue: Queue = Field(default_factory=Queue)
    execution: Execution = Field(default_factory=Execution)
    costs: Costs = Field(default_factory=Costs)
    assets: Assets = Field(default_factory=Assets)
    owners: tuple[Owner, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _require_settings_of_the_machine(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and (missing := unpinned(values)):
            raise InputRefused(
                f"execution.kind lets steps run on several machines, but {' and '.join(missing)} are not given: their "
                "defaults are those of each machine, and they are part of a checkpoint's identity.",
                remedy='Add to [quantization], such as: device = "cuda", threads = 16.',
            )
        return values

    @field_validator("store")
    @classmethod
    def _require_weights_that_are_read(cls, store: Store, known: ValidationInfo) -> Store:
        validation, quantization = known.data.get("validation"), known.data.get("quantization")
        if validation and validation.unpadded and not store.merged:
            raise ValueError("validation.unpadded quantizes the merged weights, but store.merged is false")
        if store.merged and not store.padded:
            raise ValueError("padded weights are stored if merged ones are: set store.merged = false too")
        if quantization and quantization.reads_files and not store.padded:
            raise ValueError(f"the engine {quantization.engine} reads padded weights, but store.padded is false")
        return store

    @field_validator("validation")
    @classmethod
    def _require_nf4_for_other_merge(cls, validation: Validation, known: ValidationInfo) -> Validation:
        rounded = [known.data.get("base_nf4"), *(base.nf4 for base in known.data.get("bases", {}).values())]
        if validation.other_merge and "base_nf4" in known.data and not any(rounded):
            raise ValueError(
                "validation.other_merge compares a merge onto NF4 with that onto the base, but base_nf4 is not set"
            )
        return validation

    @property
    def values(self) -> dict[str, Any]:
        """Values that give these settings again; those that are None are left out."""
        values = self.model_dump(exclude_none=True)
        if self.padding.targets:
            del values["padding"]["tensor_parallel"]
        return values

    @property
    def store_root(self) -> Path:
        return self.workspace / "store"

    @property
    def base_weights(self) -> BaseWeights:
        """The way to read the base model."""
        return BaseWeights(dequantize=self.base_dequantize, nf4=self.base_nf4, text_only=self.text_only)

    @property
    def other_base_weights(self) -> BaseWeights:
        """The way to read the base for the merge that a validation compares with: without rounding it to NF4."""
        return replace(self.base_weights, nf4=None)

    @property
    def padding_spec(self) -> PaddingSpec:
        return self.padding.spec(self.quantization.padding_unit, self.quantization.method)

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
            behaviour=validation.behaviour,
            windows=validation.windows,
            seq_len=validation.seq_len,
            text_spec=TextSpec(
                max_skipped=validation.max_skipped,
                template_arguments=self.calibration.template_arguments if arguments is None else arguments,
                limits=self.calibration.tokenizer_limits,
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
        return init_settings, env_settings, _SettingsFile(settings_cls, config_file())
