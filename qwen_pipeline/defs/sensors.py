"""Arrivals: exactly one run for each content of each fine-tune or import, once it is complete."""

import json

import dagster as dg

from qwen_pipeline.defs.jobs import process_fine_tune, repair_imported
from qwen_pipeline.defs.partitions import FINE_TUNES, IMPORTS
from qwen_pipeline.defs.resources import Pipeline
from qwen_pipeline.models.inbox import Arrival, Inbox

ARRIVAL_TAG = "qwen_pipeline/arrival"
"""A run's tag ``<fine-tune>@<content digest>``; runs from the command line carry it as well."""

_GAVE_UP = (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)


@dg.sensor(
    job=process_fine_tune,
    minimum_interval_seconds=15,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Processes each fine-tune that is complete in the inbox, and again when its content changes.",
)
def fine_tune_inbox(context: dg.SensorEvaluationContext, pipeline: dg.ResourceParam[Pipeline]) -> dg.SensorResult:
    return _ask_for_runs(context, pipeline.inbox, FINE_TUNES)


@dg.sensor(
    job=repair_imported,
    minimum_interval_seconds=15,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Repairs each quantized checkpoint that is complete among the imports, and again when it changes.",
)
def import_inbox(context: dg.SensorEvaluationContext, pipeline: dg.ResourceParam[Pipeline]) -> dg.SensorResult:
    return _ask_for_runs(context, pipeline.imports, IMPORTS)


def _ask_for_runs(
    context: dg.SensorEvaluationContext, inbox: Inbox, partitions: dg.DynamicPartitionsDefinition
) -> dg.SensorResult:
    """Ask for a run of every arrival that is settled: marked complete, or unchanged since the tick before.

    The cursor holds the fingerprint of everything that was there at the last tick, and whether it was taken.
    """
    before = json.loads(context.cursor or "{}")
    now: dict[str, dict[str, object]] = {}
    requests: list[dg.RunRequest] = []
    waiting: list[str] = []
    for arrival in inbox.arrivals():
        try:
            fingerprint, obstacle = arrival.fingerprint, arrival.obstacle()
        except OSError:
            fingerprint, obstacle = "", "its files come and go"
        seen = before.get(arrival.name, {})
        is_known = seen.get("fingerprint") == fingerprint
        is_taken = is_known and bool(seen["taken"])
        if obstacle:
            waiting.append(f"{arrival.name[:100]!r}: {obstacle}")
        elif not (is_known or arrival.is_marked_complete):
            waiting.append(f"{arrival.name!r}: it may still be changing; looking again at the next tick")
        elif not is_taken:
            requests += _run_requests(context.instance, arrival)
            is_taken = True
        now[arrival.name] = {"fingerprint": fingerprint, "taken": is_taken}
    for reason in waiting:
        context.log.info(reason)
    return dg.SensorResult(
        run_requests=requests,
        dynamic_partitions_requests=[partitions.build_add_request([str(r.partition_key) for r in requests])],
        skip_reason=None if requests else "; ".join(waiting) or f"Nothing new in {inbox.root}.",
        cursor=json.dumps(now, sort_keys=True),
    )


def _run_requests(instance: dg.DagsterInstance, arrival: Arrival) -> list[dg.RunRequest]:
    """One request, or none if this very content was given a run by hand."""
    key = f"{arrival.name}@{arrival.digest}"
    runs = instance.get_runs(filters=dg.RunsFilter(tags={ARRIVAL_TAG: key}))
    if any(run.status not in _GAVE_UP for run in runs):
        return []
    return [dg.RunRequest(partition_key=arrival.name, run_key=key, tags={ARRIVAL_TAG: key})]
