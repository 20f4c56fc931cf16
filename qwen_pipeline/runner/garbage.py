"""Retention in the current process, which leaves alone what an unfinished run of the instance uses."""

from qwen_pipeline.config import Settings
from qwen_pipeline.defs.runs import uses_of
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.retention.collect import Collection, collect
from qwen_pipeline.runner.dagster_home import open_instance
from qwen_pipeline.runner.orphaned_runs import end_orphaned_runs


def collect_garbage(settings: Settings, *, dry_run: bool = False, observe: Observe = unobserved) -> Collection:
    """Remove what no rule of ``[store.keep]`` keeps, as the asset ``retention`` does.

    Raises:
        CheckpointRefused: The log of the store was changed.
        DestinationLocked: Another process is removing outputs.
    """
    with open_instance(settings) as instance:
        end_orphaned_runs(instance)
        return collect(settings, uses=uses_of(instance), dry_run=dry_run, observe=observe)
