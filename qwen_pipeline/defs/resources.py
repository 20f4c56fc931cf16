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
from qwen_pipeline.config import Settings, settings_from_values
from qwen_pipeline.defs.config_schema import config_fields, config_values, resource_class
from qwen_pipeline.defs.interrupts import interrupts_kept
from qwen_pipeline.errors import PipelineError
from qwen_pipeline.models.inbox import Inbox
from qwen_pipeline.progress import Observe, Progress, logging_observer, unobserved

_GRAPH_SETTINGS: Mapping[str, Any] = {"store": {"merged"}, "validation": {"unpadded"}}
"""Settings that determine which assets exist. They are read when the code location is loaded, not by runs."""

_NOT_RUN_CONFIG = {**dict.fromkeys(("workspace", "inbox", "imports", "owners"), True), **_GRAPH_SETTINGS}
"""Settings that are not part of a run's config: also those of :class:`WorkspaceResource`, and the owners."""


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
        """Return the latest output of an upstream stage for the context's partition."""
        return self.store.require_latest(stage, context.partition_key)


class PipelineSettings(dg.ConfigurableResource):
    """The settings of the pipeline, as in `qwen_pipeline.toml`. A run may override any of them.

    `store.merged` and `validation.unpadded` are not included, because they determine which assets exist. To change
    them, edit the file and reload the code location.
    """

    graph_settings: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def resolve(self, workspace: WorkspaceResource) -> Settings:
        """Return the validated settings.

        Raises:
            InputRefused: A value is invalid.
        """
        directories = {"workspace": workspace.root, "inbox": workspace.inbox, "imports": workspace.imports}
        values = self.model_dump(exclude_none=True)
        graph = {section: {**values[section], **fixed} for section, fixed in self.graph_settings.items()}
        return settings_from_values({**values, **graph, **directories})


@dataclass(frozen=True, slots=True)
class StepRunner:
    """Execution of a step: progress in the log, faults as Dagster failures, and retries.

    Attributes:
        observe: Receives the progress, as the log does.
        retry_delays: Seconds to wait before each retry of a step that failed because of its environment, such as a full
            disk.
    """

    observe: Observe = unobserved
    retry_delays: tuple[int, ...] = (30, 120)

    def as_resource(self) -> dg.ResourceDefinition:
        """Return a resource without config whose value is this object, with a description for the UI."""

        def step_runner(_: dg.InitResourceContext) -> "StepRunner":
            return self

        return dg.ResourceDefinition(step_runner, description="Execution of a step: progress, faults and retries.")

    @contextmanager
    def run(self, context: dg.AssetExecutionContext) -> Generator[Observe, None, None]:
        """Yield an observer that logs progress; convert a fault into a Dagster failure.

        Only a fault that may not recur is retried. An interrupt ends the step even if a library swallowed its error.
        """
        log = logging_observer(context.log.info)
        try:
            with interrupts_kept() as require_no_interrupt:

                def observe(progress: Progress) -> None:
                    require_no_interrupt()
                    log(progress)
                    self.observe(progress)

                yield observe
                require_no_interrupt()
        except PipelineError as fault:
            delays = self.retry_delays
            if fault.retryable and context.retry_number < len(delays):
                context.log.warning(str(fault))
                raise dg.RetryRequested(len(delays), seconds_to_wait=delays[context.retry_number]) from fault
            raise dg.Failure(
                description=str(fault),
                metadata={"fault": type(fault).__name__, "what": fault.what, "remedy": fault.remedy},
                allow_retries=False,
            ) from fault


Steps = dg.ResourceParam[StepRunner]


def configured_resources(settings: Settings) -> dict[str, Any]:
    """Return the resources by key, configured with the values of ``settings``."""
    values = config_values(settings, without=_NOT_RUN_CONFIG)
    run_settings = resource_class(PipelineSettings, config_fields(Settings, values))
    run_settings.graph_settings = settings.model_dump(mode="json", include=_GRAPH_SETTINGS)
    return {
        "workspace": WorkspaceResource(
            root=str(settings.workspace), inbox=str(settings.inbox), imports=str(settings.imports)
        ),
        "settings": run_settings(),
    }
