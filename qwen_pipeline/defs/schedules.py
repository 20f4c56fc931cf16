"""The nightly schedule, which runs every fine-tune without an up-to-date validation or release."""

from collections.abc import Iterator

import dagster as dg

from qwen_pipeline.defs.jobs import process_fine_tune
from qwen_pipeline.defs.partitions import FINE_TUNES
from qwen_pipeline.defs.resources import PipelineSettings, WorkspaceResource
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
    description="Runs every fine-tune whose validation or release is missing or stale. "
    "A failed validation that is up to date is not repeated.",
)
def nightly(
    context: dg.ScheduleEvaluationContext, workspace: WorkspaceResource, settings: PipelineSettings
) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """Request a run of every known fine-tune that needs work and has no unfinished run."""
    date = f"{context.scheduled_execution_time:%Y-%m-%d}"
    config = settings.resolve(workspace)
    known = set(context.instance.get_dynamic_partitions(FINE_TUNES.name or ""))
    outdated = [
        upload.name
        for upload in workspace.fine_tunes.arrivals()
        if upload.name in known
        and status_of(config, upload.name, upload).needs_work
        and not _has_unfinished_run(context.instance, upload.name)
    ]
    if not outdated:
        yield dg.SkipReason("Every fine-tune has been validated, and every one that passed has been published.")
    for name in outdated:
        yield dg.RunRequest(partition_key=name, run_key=f"{name}@{date}")


def _has_unfinished_run(instance: dg.DagsterInstance, fine_tune: str) -> bool:
    tags = {"dagster/partition": fine_tune}
    return instance.get_runs_count(dg.RunsFilter(tags=tags, statuses=_UNFINISHED)) > 0
