"""Once a night: whatever an interrupted day, a new code version or a changed upload has left without a release."""

from collections.abc import Iterator

import dagster as dg

from qwen_pipeline.defs.jobs import process_fine_tune
from qwen_pipeline.defs.partitions import FINE_TUNES
from qwen_pipeline.defs.resources import Pipeline
from qwen_pipeline.status import status_of

_UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
]


@dg.schedule(
    job=process_fine_tune,
    cron_schedule="0 2 * * *",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Runs every fine-tune whose proof or release is missing or stale. A verdict that stands is left alone.",
)
def nightly(
    context: dg.ScheduleEvaluationContext, pipeline: dg.ResourceParam[Pipeline]
) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """Ask for a run of every fine-tune that needs work and is not being worked on."""
    night = f"{context.scheduled_execution_time:%Y-%m-%d}"
    known = set(context.instance.get_dynamic_partitions(FINE_TUNES.name or ""))
    wanting = [
        arrival.name
        for arrival in pipeline.inbox.arrivals()
        if arrival.name in known
        and status_of(pipeline.settings, arrival.name, arrival).needs_work
        and not _is_running(context.instance, arrival.name)
    ]
    if not wanting:
        yield dg.SkipReason("Every fine-tune has its verdict, and every one that passed is published.")
    for name in wanting:
        yield dg.RunRequest(partition_key=name, run_key=f"{name}@{night}")


def _is_running(instance: dg.DagsterInstance, name: str) -> bool:
    tags = {"dagster/partition": name}
    return instance.get_runs_count(dg.RunsFilter(tags=tags, statuses=_UNFINISHED)) > 0
