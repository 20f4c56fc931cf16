"""One fine-tune through the whole graph in this process: same instance and same store as the server's, no daemon."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import dagster as dg

from qwen_pipeline import errors
from qwen_pipeline.checkpoint.manifest import open_manifest
from qwen_pipeline.checkpoint.store.destinations import Artifact
from qwen_pipeline.config import Settings
from qwen_pipeline.defs.build import code_location
from qwen_pipeline.defs.jobs import process_fine_tune
from qwen_pipeline.defs.partitions import FINE_TUNES
from qwen_pipeline.defs.resources import Pipeline
from qwen_pipeline.defs.sensors import ARRIVAL_TAG, fine_tune_inbox
from qwen_pipeline.errors import CheckFailed, PipelineError
from qwen_pipeline.models.inbox import require_name
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.runner.dagster_home import open_instance
from qwen_pipeline.runner.orphaned_runs import PROCESS_TAG, end_orphaned_runs, this_process


class StepCrashed(Exception):
    """A step ended in an exception that nobody foresaw. The text is its traceback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run left behind.

    Attributes:
        artifacts: What the stages made or found, in the order of the graph, up to where it stopped.
        fault: Why it stopped, if it did.
    """

    fine_tune: str
    run_id: str
    artifacts: Sequence[Artifact]
    fault: BaseException | None


def run_fine_tune(settings: Settings, fine_tune: str, *, watch: Observe = unobserved) -> Outcome:
    """Materialize every asset of one partition.

    Raises:
        InputRefused: The fine-tune is not in the inbox or not complete, or a setting is missing.
        EnvironmentFault: The engine's environment is not there.
    """
    pipeline = Pipeline(settings, watch, pauses=())
    arrival = pipeline.inbox.require(fine_tune)
    pipeline.require_ready()
    return materialize(pipeline, fine_tune, tags={ARRIVAL_TAG: f"{fine_tune}@{arrival.digest}"})


def publish_fine_tune(settings: Settings, fine_tune: str, *, watch: Observe = unobserved) -> Outcome:
    """Materialize the release alone, from what the store last held."""
    return materialize(Pipeline(settings, watch, pauses=()), require_name(fine_tune), only=["published_checkpoint"])


def look_into_inbox(settings: Settings) -> list[str]:
    """Have the real sensor look twice, as the daemon would, and return what it says each time."""
    pipeline, cursor, said = Pipeline(settings), None, list[str]()
    with open_instance(settings) as instance:
        for _ in range(2):
            context = dg.build_sensor_context(
                instance, cursor, definitions=code_location(pipeline), resources={"pipeline": pipeline}
            )
            result = cast("dg.SensorResult", fine_tune_inbox(context))
            cursor = result.cursor
            asked = [f"a run of {request.run_key} is asked for" for request in result.run_requests or ()]
            said += asked or [str(result.skip_reason.skip_message if result.skip_reason else "nothing new")]
    return said


def materialize(
    pipeline: Pipeline, fine_tune: str, *, only: Sequence[str] = (), tags: Mapping[str, str] | None = None
) -> Outcome:
    """Materialize all assets of one partition, or ``only`` some by name, and say what came of it."""
    job = code_location(pipeline).resolve_job_def(process_fine_tune.name)
    with open_instance(pipeline.settings) as instance:
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
    """The directories that this run reports, read back from disk."""
    found: list[Artifact] = []
    for event in result.get_asset_materialization_events():
        metadata = event.materialization.metadata
        if "derivation" in metadata:
            path = Path(str(metadata["path"].value))
            found.append(Artifact(path=path, manifest=open_manifest(path), reused=bool(metadata["reused"].value)))
    return found


def _fault(result: dg.ExecuteInProcessResult) -> BaseException:
    for event in result.get_step_failure_events():
        failure = event.step_failure_data
        stated = failure.user_failure_data.metadata if failure.user_failure_data else {}
        if "fault" in stated:
            kind: type[PipelineError] = getattr(errors, str(stated["fault"].value), PipelineError)
            return kind(str(stated["what"].value), remedy=str(stated["remedy"].value))
        if check := _blocking_failure(result):
            return check
        if failure.error:
            cause = failure.error.cause or failure.error
            if cause.cls_name == dg.DagsterExecutionInterruptedError.__name__:
                return KeyboardInterrupt()
            return StepCrashed(f"{event.step_key}: {cause.message.strip()}\n{failure.error.to_string()}")
    return StepCrashed("The run ended without a reason; its log is in the UI.")


def _blocking_failure(result: dg.ExecuteInProcessResult) -> CheckFailed | None:
    for check in result.get_asset_check_evaluations():
        if check.blocking and not check.passed and check.severity is dg.AssetCheckSeverity.ERROR:
            what = f"The check {check.check_name} of {check.asset_key.to_user_string()} failed: {check.description}"
            return CheckFailed(what, remedy="Correct what it names, then run again: what is finished is kept.")
    return None
