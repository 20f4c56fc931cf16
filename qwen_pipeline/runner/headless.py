"""Runs in the current process, with the instance and the store of the server but without a daemon."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import dagster as dg

from qwen_pipeline import errors
from qwen_pipeline.checkpoint.manifest import open_manifest
from qwen_pipeline.checkpoint.store.destinations import Artifact
from qwen_pipeline.config import Settings
from qwen_pipeline.config.inputs import require_ready
from qwen_pipeline.definitions import code_location
from qwen_pipeline.defs.jobs import process_fine_tune
from qwen_pipeline.defs.partitions import FINE_TUNES
from qwen_pipeline.defs.resources import StepRunner, configured_resources
from qwen_pipeline.defs.sensors import ARRIVAL_TAG, fine_tune_inbox
from qwen_pipeline.errors import CheckFailed, PipelineError
from qwen_pipeline.models.inbox import Inbox, require_name
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.runner.dagster_home import open_instance
from qwen_pipeline.runner.orphaned_runs import PROCESS_TAG, end_orphaned_runs, this_process


class StepCrashed(Exception):
    """A step failed with an unexpected exception. The message is its traceback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        artifacts: The outputs of the stages that finished, new or reused, in the order of the graph.
        fault: The reason why the run stopped early, if it did.
    """

    fine_tune: str
    run_id: str
    artifacts: Sequence[Artifact]
    fault: BaseException | None


def run_fine_tune(settings: Settings, fine_tune: str, *, observe: Observe = unobserved) -> Outcome:
    """Materialize all assets of one fine-tune.

    Raises:
        InputRefused: The fine-tune is not in the inbox or is not complete, or a setting is missing or invalid.
        EnvironmentFault: The environment of a configured engine is not installed.
    """
    upload = Inbox(settings.inbox).require(fine_tune)
    require_ready(settings)
    tags = {ARRIVAL_TAG: f"{fine_tune}@{upload.digest}"}
    return materialize(settings, fine_tune, observe=observe, tags=tags)


def publish_fine_tune(settings: Settings, fine_tune: str, *, observe: Observe = unobserved) -> Outcome:
    """Materialize only the release, from the latest outputs in the store."""
    return materialize(settings, require_name(fine_tune), only=["published_checkpoint"], observe=observe)


def evaluate_inbox_sensor(settings: Settings) -> list[str]:
    """Evaluate the sensor of the inbox twice, like the daemon, and return its messages."""
    definitions, cursor, messages = code_location(settings), None, list[str]()
    workspace = configured_resources(settings)["workspace"]
    with open_instance(settings) as instance:
        for _ in range(2):
            context = dg.build_sensor_context(
                instance, cursor, definitions=definitions, resources={"workspace": workspace}
            )
            result = cast("dg.SensorResult", fine_tune_inbox(context))
            cursor = result.cursor
            requested = [f"requested a run of {request.run_key}" for request in result.run_requests or ()]
            messages += requested or [str(result.skip_reason.skip_message if result.skip_reason else "nothing new")]
    return messages


def materialize(
    settings: Settings,
    fine_tune: str,
    *,
    only: Sequence[str] = (),
    observe: Observe = unobserved,
    tags: Mapping[str, str] | None = None,
) -> Outcome:
    """Materialize all assets of one partition, or only those named in ``only``. Nothing is retried."""
    definitions = code_location(settings, StepRunner(observe, retry_delays=()))
    with open_instance(settings) as instance:
        job = definitions.resolve_job_def(process_fine_tune.name)
        end_orphaned_runs(instance)
        instance.add_dynamic_partitions(FINE_TUNES.name or "", [fine_tune])
        result = job.execute_in_process(
            instance=instance,
            partition_key=fine_tune,
            asset_selection=[dg.AssetKey(name) for name in only] or None,
            tags={PROCESS_TAG: this_process(), **(tags or {})},
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            raise_on_error=False,
        )
    artifacts = _artifacts(result)
    fault = None if result.success else _fault(result)
    return Outcome(fine_tune=fine_tune, run_id=result.run_id, artifacts=artifacts, fault=fault)


def _artifacts(result: dg.ExecuteInProcessResult) -> list[Artifact]:
    """Return the artifacts that the run materialized, with their manifests read from disk."""
    artifacts: list[Artifact] = []
    for event in result.get_asset_materialization_events():
        metadata = event.materialization.metadata
        if "derivation" in metadata:
            path = Path(str(metadata["path"].value))
            artifacts.append(Artifact(path=path, manifest=open_manifest(path), reused=bool(metadata["reused"].value)))
    return artifacts


def _fault(result: dg.ExecuteInProcessResult) -> BaseException:
    """Return the fault of the first step that failed, as the exception that its stage raised."""
    for event in result.get_step_failure_events():
        failure = event.step_failure_data
        metadata = failure.user_failure_data.metadata if failure.user_failure_data else {}
        if "fault" in metadata:
            kind: type[PipelineError] = getattr(errors, str(metadata["fault"].value), PipelineError)
            return kind(str(metadata["what"].value), remedy=str(metadata["remedy"].value))
        if check := _blocking_failure(result):
            return check
        if failure.error:
            cause = failure.error.cause or failure.error
            if cause.cls_name == dg.DagsterExecutionInterruptedError.__name__:
                return KeyboardInterrupt()
            return StepCrashed(f"{event.step_key}: {cause.message.strip()}\n{failure.error.to_string()}")
    return StepCrashed("The run failed without a step failure. Open the UI and read its log.")


def _blocking_failure(result: dg.ExecuteInProcessResult) -> CheckFailed | None:
    for check in result.get_asset_check_evaluations():
        if check.blocking and not check.passed and check.severity is dg.AssetCheckSeverity.ERROR:
            what = f"The check {check.check_name} of {check.asset_key.to_user_string()} failed: {check.description}"
            return CheckFailed(what, remedy="Correct the cause, then run again: finished stages are reused.")
    return None
