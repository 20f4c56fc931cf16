"""Unfinished runs: the fine-tunes that they use."""

from collections.abc import Callable

import dagster as dg

from qwen_pipeline.checkpoint.store.products import product
from qwen_pipeline.defs.partitions import PARTITION_TAG

UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def has_unfinished_run(instance: dg.DagsterInstance, partition: str) -> bool:
    return instance.get_runs_count(dg.RunsFilter(tags={PARTITION_TAG: partition}, statuses=UNFINISHED)) > 0


def uses_of(instance: dg.DagsterInstance, *, but: str = "") -> Callable[[str], str]:
    """Return a function that says which unfinished run, but the one with this id, uses the outputs of a fine-tune.

    A run without a partition, such as an audit of all releases, may use any.
    """

    def uses(fine_tune: str) -> str:
        for run in instance.get_runs(filters=dg.RunsFilter(statuses=UNFINISHED)):
            partition = run.tags.get(PARTITION_TAG)
            if run.run_id != but and (partition is None or product(partition).fine_tune == fine_tune):
                return f"the run {run.run_id[:8]} uses it"
        return ""

    return uses
