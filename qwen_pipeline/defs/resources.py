"""Resources of the assets: directories, settings, and the execution of a step.

The first two can be configured in the launchpad or with ``dg.EnvVar``. Their initial values come from the settings file
and the environment of the code location.
"""

# pyright: reportMissingTypeArgument=false
# As in Dagster's documentation, a ConfigurableResource that is its own value has no type argument.

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import dagster as dg
from pydantic import Field

from qwen_pipeline.checkpoint.store.destinations import Artifact, CheckpointStore, Slot
from qwen_pipeline.checkpoint.store.origin import origin, started_through
from qwen_pipeline.config import Settings, settings_from_values
from qwen_pipeline.defs.config_schema import config_fields, config_values, resource_class
from qwen_pipeline.defs.interrupts import interrupts_kept
from qwen_pipeline.defs.partitions import FINE_TUNES, STAGE_TAG, TRIGGER_TAG, product_tags
from qwen_pipeline.errors import CheckFailed, PipelineError, machine_fault
from qwen_pipeline.intake.placement import settings_of_product
from qwen_pipeline.models.inbox import Inbox
from qwen_pipeline.progress import Observe, Progress, logging_observer, unobserved
from qwen_pipeline.reports import load_reports
from qwen_pipeline.workers.child import die_with_parent

_FIXED_SETTINGS: Mapping[str, Any] = {
    **dict.fromkeys(("bases", "recipes", "default_recipes", "uploads_choose_recipes", "release", "queue"), True),
    "store": {"merged", "keep"},
    "validation": {"other_merge", "unpadded"},
}
"""Settings that determine which assets and products exist, and those of operators: no run overrides them."""

_NOT_RUN_CONFIG = {
    **dict.fromkeys(("workspace", "inbox", "imports", "owners", "notify", "openlineage", "execution", "assets"), True),
    **_FIXED_SETTINGS,
}
"""Settings that are not part of a run's config: also those of :class:`WorkspaceResource`, and of the UI."""


class WorkspaceResource(dg.ConfigurableResource):
    """Directories of uploads and of finished checkpoints."""

    root: str = Field(description="Root of all files that the pipeline writes; checkpoints are below `store`.")
    inbox: str = Field(description="Directory into which fine-tunes are uploaded, one subdirectory each.")
    imports: str = Field(description="Directory into which quantized checkpoints are uploaded, one subdirectory each.")

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(Path(self.root) / "store")

    @property
    def fine_tunes(self) -> Inbox:
        return Inbox(Path(self.inbox))

    @property
    def quantized_imports(self) -> Inbox:
        return Inbox(Path(self.imports))

    def slot(self, context: dg.AssetExecutionContext) -> Slot:
        """Return the destination of the context's partition."""
        return self.store.slot(context.partition_key)

    def latest(self, context: dg.AssetExecutionContext, stage: str) -> Artifact:
        """Return the latest output of an upstream stage for the context's partition.

        Raises:
            CheckpointRefused: There is none, or its manifest cannot be trusted.
            CheckFailed: A blocking check of it failed. Dagster stops only the run of that check, and no later one.
        """
        found = self.store.require_latest(stage, context.partition_key)
        if failed := [report for report in load_reports(found.manifest.result) if report.blocks]:
            raise CheckFailed(
                f"The check {failed[0].name} of {found.path} failed: {failed[0].detail}",
                remedy="Correct the cause, and make it again first.",
            )
        return found


class PipelineSettings(dg.ConfigurableResource):
    """The settings of the pipeline, as in `qwen_pipeline.toml`. A run may override any of them.

    `store.merged`, `validation.unpadded` and `validation.other_merge` are not included, because they determine which
    assets exist, nor are bases and recipes, which determine the partitions. To change them, edit the file and reload
    the code location.
    """

    fixed_settings: ClassVar[Mapping[str, Any]] = {}

    def resolve(self, workspace: WorkspaceResource) -> Settings:
        """Return the validated settings, with all bases and recipes.

        Raises:
            InputRefused: A value is invalid.
        """
        directories = {"workspace": workspace.root, "inbox": workspace.inbox, "imports": workspace.imports}
        values = self.model_dump(exclude_none=True)
        fixed = {
            name: {**values.get(name, {}), **value} if isinstance(value, Mapping) else value
            for name, value in self.fixed_settings.items()
        }
        if values.get("base_model"):  # a run named it: several bases and this setting exclude each other in the file
            fixed["bases"] = {}
        return settings_from_values({**values, **fixed, **directories})

    def of_product(self, workspace: WorkspaceResource, context: dg.AssetExecutionContext) -> Settings:
        """Return the settings of the context's partition: those of its base and its recipe, with the run's overrides.

        Raises:
            InputRefused: A value is invalid, or the fine-tune fits none of the bases, or several.
        """
        overrides = _picked(self.model_dump(exclude_none=True), _run_config(context))
        return settings_of_product(self.resolve(workspace), context.partition_key, overrides=overrides)


def _run_config(context: dg.AssetExecutionContext) -> Mapping[str, Any]:
    """Return the settings that a run's config names; none of an asset that is called directly, which has no run."""
    try:
        config: Any = context.run.run_config
    except dg.DagsterError:
        return {}
    return config.get("resources", {}).get("settings", {}).get("config", {})


def _picked(values: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values whose names appear in ``named``, and of sections those that appear there."""

    def picked(value: Any, part: Any) -> Any:
        is_section = isinstance(value, Mapping) and isinstance(part, Mapping)
        return _picked(value, part) if is_section else value

    return {name: picked(value, named[name]) for name, value in values.items() if name in named}


@dataclass(frozen=True, slots=True)
class StepRunner:
    """Execution of a step: progress in the log, faults as Dagster failures, and retries.

    Attributes:
        observe: Receives the progress, as the log does.
        retry_delays: Seconds to wait before each retry of a step that failed because of its environment, such as a full
            disk.
        dies_with_parent: Whether the process of a step is killed when its parent ends. Ray ends a step's parent when
            its node is lost, but not the step, and then starts another one.
    """

    observe: Observe = unobserved
    retry_delays: tuple[int, ...] = (30, 120)
    dies_with_parent: bool = False

    def as_resource(self) -> dg.ResourceDefinition:
        """Return a resource without config whose value is this object, with a description for the UI."""

        def step_runner(_: dg.InitResourceContext) -> "StepRunner":
            return self

        return dg.ResourceDefinition(step_runner, description="Execution of a step: progress, faults and retries.")

    @contextmanager
    def run(self, context: dg.AssetExecutionContext) -> Generator[Observe, None, None]:
        """Yield an observer that logs progress; convert a fault into a Dagster failure.

        An interrupt ends the step even if a library swallowed its error.

        Raises:
            dagster.RetryRequested: The fault may not recur, and the step has a retry left.
            dagster.Failure: The fault would recur, or no retry is left.
        """
        log = logging_observer(context.log.info)
        if self.dies_with_parent:
            die_with_parent()
        try:
            with interrupts_kept() as require_no_interrupt:

                def observe(progress: Progress) -> None:
                    require_no_interrupt()
                    log(progress)
                    self.observe(progress)

                trigger, run, is_automatic = _trigger(context)
                with started_through(trigger, run=run, otherwise=not is_automatic):
                    _tag_run(context, origin()["trigger"])
                    yield observe
                require_no_interrupt()
        except (PipelineError, OSError, MemoryError) as error:
            fault = error if isinstance(error, PipelineError) else machine_fault(error)
            delays = self.retry_delays
            if fault.retryable and context.retry_number < len(delays):
                context.log.warning(str(fault))
                raise dg.RetryRequested(len(delays), seconds_to_wait=delays[context.retry_number]) from error
            raise dg.Failure(
                description=str(fault),
                metadata={"fault": type(fault).__name__, "what": fault.what, "remedy": fault.remedy},
                allow_retries=False,
            ) from error


Steps = dg.ResourceParam[StepRunner]


def _tag_run(context: dg.AssetExecutionContext, trigger: str) -> None:
    """Add the tags by which a person finds a run; an asset that is called directly has no run."""
    try:
        run = context.run
    except dg.DagsterError:
        return
    tags = {STAGE_TAG: context.assets_def.op.name, TRIGGER_TAG: trigger}
    if context.assets_def.partitions_def == FINE_TUNES:
        tags |= product_tags(context.partition_key)
    context.instance.add_run_tags(run.run_id, tags)


def _trigger(context: dg.AssetExecutionContext) -> tuple[str, str, bool]:
    """Return the sensor or schedule that requested a run (or else its job), the run's id, and if it is automatic.

    An asset that is called directly, as in tests of code that uses it, has no run.
    """
    try:
        run = context.run
    except dg.DagsterError:
        return "direct call", "", False
    tags = {"sensor": "dagster/sensor_name", "schedule": "dagster/schedule_name"}
    automatic = next((f"{kind} {run.tags[tag]}" for kind, tag in tags.items() if tag in run.tags), "")
    return automatic or f"job {run.job_name}", run.run_id, bool(automatic)


def configured_resources(settings: Settings) -> dict[str, Any]:
    """Return the resources by key, configured with the values of ``settings``."""
    values = config_values(settings, without=_NOT_RUN_CONFIG)
    run_settings = resource_class(PipelineSettings, config_fields(Settings, values))
    run_settings.fixed_settings = settings.model_dump(mode="json", include=_FIXED_SETTINGS)
    return {
        "workspace": WorkspaceResource(
            root=str(settings.workspace), inbox=str(settings.inbox), imports=str(settings.imports)
        ),
        "settings": run_settings(),
    }
