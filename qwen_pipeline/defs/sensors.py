"""The sensors of the two inboxes: one run for each upload once it is complete, and another if its content changes."""

import json

import dagster as dg

from qwen_pipeline.defs.jobs import process_fine_tune, repair_imported
from qwen_pipeline.defs.partitions import FINE_TUNES, IMPORTS
from qwen_pipeline.defs.resources import WorkspaceResource
from qwen_pipeline.models.inbox import Arrival, Inbox

ARRIVAL_TAG = "qwen_pipeline/arrival"
"""Tag of a run: ``<fine-tune>@<content digest>``. Runs started from the command line have it too."""

_UNSUCCESSFUL = (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)


@dg.sensor(
    job=process_fine_tune,
    minimum_interval_seconds=15,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Processes each fine-tune in the inbox once its upload is complete, and again if its content changes.",
)
def fine_tune_inbox(context: dg.SensorEvaluationContext, workspace: WorkspaceResource) -> dg.SensorResult:
    return _evaluate(context, workspace.fine_tunes, FINE_TUNES)


@dg.sensor(
    job=repair_imported,
    minimum_interval_seconds=15,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Repairs each imported checkpoint once its upload is complete, and again if its content changes.",
)
def import_inbox(context: dg.SensorEvaluationContext, workspace: WorkspaceResource) -> dg.SensorResult:
    return _evaluate(context, workspace.quantized_imports, IMPORTS)


def _evaluate(
    context: dg.SensorEvaluationContext, inbox: Inbox, partitions: dg.DynamicPartitionsDefinition
) -> dg.SensorResult:
    """Request a run of every upload that is complete: marked as complete, or unchanged since the previous tick.

    The cursor holds, for each upload of this tick, its fingerprint and whether it has been processed (``taken``).
    """
    previous = json.loads(context.cursor or "{}")
    current: dict[str, dict[str, object]] = {}
    requests: list[dg.RunRequest] = []
    waiting: list[str] = []
    for upload in inbox.arrivals():
        try:
            fingerprint, obstacle = upload.fingerprint, upload.obstacle()
        except OSError:
            fingerprint, obstacle = "", "the upload is still changing"
        entry = previous.get(upload.name, {})
        is_unchanged = entry.get("fingerprint") == fingerprint
        is_processed = is_unchanged and bool(entry["taken"])
        if obstacle:
            waiting.append(f"{upload.name[:100]!r}: {obstacle}")
        elif not (is_unchanged or upload.is_marked_complete):
            waiting.append(f"{upload.name!r}: the upload may still be changing; checking again at the next tick")
        elif not is_processed:
            requests += _run_requests(context.instance, upload)
            is_processed = True
        current[upload.name] = {"fingerprint": fingerprint, "taken": is_processed}
    for reason in waiting:
        context.log.info(reason)
    return dg.SensorResult(
        run_requests=requests,
        dynamic_partitions_requests=[partitions.build_add_request([str(r.partition_key) for r in requests])],
        skip_reason=None if requests else "; ".join(waiting) or f"Nothing new in {inbox.root}.",
        cursor=json.dumps(current, sort_keys=True),
    )


def _run_requests(instance: dg.DagsterInstance, upload: Arrival) -> list[dg.RunRequest]:
    """Return one request, or none if this content already has a run that did not fail."""
    key = f"{upload.name}@{upload.digest}"
    runs = instance.get_runs(filters=dg.RunsFilter(tags={ARRIVAL_TAG: key}))
    if any(run.status not in _UNSUCCESSFUL for run in runs):
        return []
    return [dg.RunRequest(partition_key=upload.name, run_key=key, tags={ARRIVAL_TAG: key})]
