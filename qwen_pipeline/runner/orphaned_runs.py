"""Runs of the command line whose process was killed: nobody else would end them or give back their places in pools.

Dagster's daemon does this for the runs that it launched. Without it, the next run would wait for the pool forever.
"""

import os
import socket
from pathlib import Path

import dagster as dg

PROCESS_TAG = "qwen_pipeline/process"
"""A run's tag ``<host>/<process id>/<start time of the process in clock ticks>``."""


def this_process() -> str:
    return _identity(os.getpid()) or f"{socket.gethostname()}/{os.getpid()}/0"


def end_orphaned_runs(instance: dg.DagsterInstance) -> None:
    """Mark each unfinished run of a process of this host that is gone as failed, and free its places in pools."""
    for run in instance.get_runs(filters=dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])):
        host, _, rest = run.tags.get(PROCESS_TAG, "").partition("/")
        if host == socket.gethostname() and _identity(int(rest.partition("/")[0])) != run.tags[PROCESS_TAG]:
            instance.report_run_failed(run, "The process of this run was killed; run it again to continue.")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)


def _identity(pid: int) -> str | None:
    """Return what no later process with the same id shares, or None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    start_time = stat.rpartition(")")[2].split()[19]
    return f"{socket.gethostname()}/{pid}/{start_time}"
