"""The nightly schedule, which runs every fine-tune without an up-to-date validation or release."""

from collections.abc import Iterator

import dagster as dg

from qwen_pipeline.defs.arrivals.admission import Admission
from qwen_pipeline.defs.jobs import process_fine_tune
from qwen_pipeline.defs.partitions import FINE_TUNES
from qwen_pipeline.defs.resources import PipelineSettings, WorkspaceResource
from qwen_pipeline.defs.runs import has_unfinished_run
from qwen_pipeline.status import fine_tune_statuses


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
    """Request a run of every known product that needs work and has no unfinished run."""
    date = f"{context.scheduled_execution_time:%Y-%m-%d}"
    config = settings.resolve(workspace)
    known = set(context.instance.get_dynamic_partitions(FINE_TUNES.name or ""))
    outdated = {
        status.name: status.base
        for status in fine_tune_statuses(config)
        if status.name in known and status.needs_work and not has_unfinished_run(context.instance, status.name)
    }
    if not outdated:
        yield dg.SkipReason("Every fine-tune has been validated, and every one that passed has been published.")
    admission = Admission(config, context.instance)
    for name, base in outdated.items():
        if reason := admission.refuse(name):
            context.log.warning(f"{name}: {reason}")
            continue
        yield dg.RunRequest(partition_key=name, run_key=f"{name}@{date}", tags=admission.tags(name, base))
