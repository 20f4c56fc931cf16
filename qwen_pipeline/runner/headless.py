"""Runs in the current process, with the instance and the store of the server but without a daemon."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import dagster as dg

from qwen_pipeline import errors
from qwen_pipeline.checkpoint.manifest import open_manifest
from qwen_pipeline.checkpoint.store.destinations import Artifact
from qwen_pipeline.checkpoint.store.products import product
from qwen_pipeline.config import Settings
from qwen_pipeline.config.execution import Execution
from qwen_pipeline.config.inputs import require_ready
from qwen_pipeline.definitions import code_location
from qwen_pipeline.defs.arrivals.sensors import ARRIVAL_TAG, fine_tune_inbox
from qwen_pipeline.defs.jobs import process_fine_tune
from qwen_pipeline.defs.partitions import FINE_TUNES, product_tags
from qwen_pipeline.defs.resources import StepRunner, configured_resources
from qwen_pipeline.errors import CheckFailed, InputRefused, PipelineError
from qwen_pipeline.intake.placement import base_of, settings_of_product
from qwen_pipeline.intake.recipes import products_of, require_recipe
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
        key: The product.
        artifacts: The outputs of the stages that finished, new or reused, in the order of the graph.
        fault: The reason why the run stopped early, if it did.
    """

    key: str
    run_id: str
    artifacts: Sequence[Artifact]
    fault: BaseException | None


def run_fine_tune(
    settings: Settings, fine_tune: str, *, recipe: str | None = None, observe: Observe = unobserved
) -> Outcome:
    """Materialize all assets of one product of a fine-tune.

    Args:
        settings: All settings.
        fine_tune: The fine-tune's name.
        recipe: The recipe, which need not be one that its rule applies to it; by default the only one that is.
        observe: Called with the progress.

    Raises:
        InputRefused: The fine-tune is not in the inbox, is not complete or has no base, several recipes apply to it, or
            a setting is missing or invalid.
        EnvironmentFault: The environment of a configured engine is not installed.
    """
    keys = products_to_run(settings, fine_tune, recipe=recipe)
    if len(keys) > 1:
        raise InputRefused(f"{fine_tune!r} has the products {', '.join(keys)}.", remedy="Run each: pass its recipe.")
    return run_product(settings, keys[0], observe=observe)


def products_to_run(settings: Settings, fine_tune: str, *, recipe: str | None = None) -> list[str]:
    """Return the keys of the products of a fine-tune in the inbox: of one recipe, or of all that apply to it.

    Raises:
        InputRefused: It is not in the inbox, is not complete or has no base, there is no such recipe for it, or a
            setting is missing or invalid.
        EnvironmentFault: The environment of a configured engine is not installed.
    """
    upload = Inbox(settings.inbox).require(fine_tune)
    base = base_of(settings, fine_tune)
    if recipe is None:
        keys = [each.key for each in products_of(settings, fine_tune, base=base, root=upload.path)]
    else:
        require_recipe(settings, recipe, base)
        keys = [product(f"{fine_tune}@{recipe}").key]
    for key in keys:
        require_ready(settings_of_product(settings, key))
    return keys


def run_product(settings: Settings, key: str, *, observe: Observe = unobserved) -> Outcome:
    """Materialize all assets of one of :func:`products_to_run`."""
    upload = Inbox(settings.inbox).find(product(key).fine_tune)
    return materialize(settings, key, observe=observe, tags={ARRIVAL_TAG: f"{key}@{upload.identity}"})


def publish_fine_tune(
    settings: Settings, fine_tune: str, *, recipe: str | None = None, observe: Observe = unobserved
) -> Outcome:
    """Materialize only the release of a product, from the latest outputs in the store."""
    key = product(f"{require_name(fine_tune)}@{recipe or ''}").key
    return materialize(settings, key, only=["published_checkpoint"], observe=observe)


def evaluate_inbox_sensor(settings: Settings) -> list[str]:
    """Evaluate the sensor of the inbox twice, like the daemon, and return its messages."""
    definitions, cursor, messages = code_location(_here(settings)), None, list[str]()
    resources = configured_resources(settings)
    with open_instance(settings) as instance:
        for _ in range(2):
            context = dg.build_sensor_context(instance, cursor, definitions=definitions, resources=resources)
            result = cast("dg.SensorResult", fine_tune_inbox(context))
            cursor = result.cursor
            requested = [f"requested a run of {request.run_key}" for request in result.run_requests or ()]
            messages += requested or [str(result.skip_reason.skip_message if result.skip_reason else "nothing new")]
    return messages


def materialize(
    settings: Settings,
    key: str,
    *,
    only: Sequence[str] = (),
    observe: Observe = unobserved,
    tags: Mapping[str, str] | None = None,
) -> Outcome:
    """Materialize all assets of one product's partition, or only those named in ``only``. Nothing is retried."""
    definitions = code_location(_here(settings), StepRunner(observe, retry_delays=()))
    with open_instance(settings) as instance:
        job = definitions.resolve_job_def(process_fine_tune.name)
        end_orphaned_runs(instance)
        instance.add_dynamic_partitions(FINE_TUNES.name or "", [key])
        result = job.execute_in_process(
            instance=instance,
            partition_key=key,
            asset_selection=[dg.AssetKey(name) for name in only] or None,
            tags={PROCESS_TAG: this_process(), **product_tags(key), **(tags or {})},
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            raise_on_error=False,
        )
    artifacts = _artifacts(result)
    fault = None if result.success else _fault(result)
    return Outcome(key=key, run_id=result.run_id, artifacts=artifacts, fault=fault)


def _here(settings: Settings) -> Settings:
    """Return the settings with all steps in this process, wherever ``execution`` has them run."""
    return settings.model_copy(update={"execution": Execution()})


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
