"""Cleanup of command-line runs whose process was killed.

Dagster's daemon monitors only the runs that it launched. Without this cleanup, such a run would stay in progress and
keep its slots in concurrency pools, and the next run would wait for them forever.
"""

import os
import socket
from pathlib import Path

import dagster as dg

PROCESS_TAG = "qwen_pipeline/process"
"""Tag of a run: ``<host>/<process id>/<start time of the process in clock ticks>``."""


def this_process() -> str:
    """Return the identity of the current process, as in :data:`PROCESS_TAG`."""
    return _identity(os.getpid()) or f"{socket.gethostname()}/{os.getpid()}/0"


def end_orphaned_runs(instance: dg.DagsterInstance) -> None:
    """Mark each unfinished run of a dead process of this host as failed, and free its slots in concurrency pools."""
    for run in instance.get_runs(filters=dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])):
        host, _, rest = run.tags.get(PROCESS_TAG, "").partition("/")
        if host == socket.gethostname() and _identity(int(rest.partition("/")[0])) != run.tags[PROCESS_TAG]:
            instance.report_run_failed(run, "The process of this run was killed. Run it again to continue.")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)


def _identity(pid: int) -> str | None:
    """Return an identity that no later process with the same id shares, or None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    start_time = stat.rpartition(")")[2].split()[19]
    return f"{socket.gethostname()}/{pid}/{start_time}"
