"""The runs that may start: their priority, and the disk that unfinished runs leave to them."""

import shutil
from dataclasses import dataclass, field
from typing import Protocol

import dagster as dg

from qwen_pipeline.checkpoint.store.products import product
from qwen_pipeline.config import Settings
from qwen_pipeline.config.storage import Keep
from qwen_pipeline.defs.jobs import process_fine_tune
from qwen_pipeline.defs.operations.retention_assets import collect_garbage
from qwen_pipeline.defs.partitions import PARTITION_TAG, product_tags
from qwen_pipeline.defs.runs import UNFINISHED
from qwen_pipeline.intake.outlay import Outlays, written_bytes

PRIORITY_TAG = "dagster/priority"
"""Dagster's tag of a run: those with a higher number are started first."""
_STEP = 10**6
"""Difference of two priorities in the tag; models are compared in units of 0.1 GB below it."""
_UNIT = 10**8
_ENDED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]


class _Usage(Protocol):
    @property
    def total(self) -> int: ...
    @property
    def free(self) -> int: ...


@dataclass(slots=True)
class Admission:
    """The decision on each run that a tick of the sensor would request.

    Attributes:
        is_full: Whether a run was refused in this tick.
    """

    settings: Settings
    instance: dg.DagsterInstance
    outlays: Outlays = field(init=False)
    is_full: bool = False
    _left: int | None = None

    def __post_init__(self) -> None:
        self.outlays = Outlays(self.settings)

    def tags(self, key: str, base: str) -> dict[str, str]:
        """Return the tags of a product's runs, with their priority unless it is the default."""
        queue, named = self.settings.queue, product(key)
        recipe = self.settings.recipes.get(named.recipe or "")
        priority = queue.priority_of(named.fine_tune) + (recipe.priority if recipe else 0)
        if queue.small_first:
            priority = priority * _STEP - min(self.outlays.of(key).read_bytes // _UNIT, _STEP - 1)
        return product_tags(key, base) | ({PRIORITY_TAG: str(priority)} if priority else {})

    def refuse(self, key: str) -> str:
        """Return why a run of a product cannot be requested now; if it can, its disk is reserved.

        Runs are admitted in order: after a refusal nothing else is admitted, unless smaller models may pass. A run that
        needs more than the whole disk does not hold up others.
        """
        queue = self.settings.queue
        if not queue.reserve_disk or not (need := self.outlays.of(key).disk_bytes):
            return ""
        if self.is_full and not queue.small_first:
            return "it waits for the disk, behind others"
        spare = int(queue.spare_gb * 1e9)
        if need > (total := self._disk().total) - spare:
            return f"it needs {need / 1e9:.1f} GB, and the whole disk has {total / 1e9:.1f} GB"
        left = self._left_bytes() - spare
        if need > left:
            self.is_full = True
            return f"it needs {need / 1e9:.1f} GB, and the disk has {max(left, 0) / 1e9:.1f} GB beside running ones"
        self._left = self._left_bytes() - need
        return ""

    def retention_requests(self) -> list[dg.RunRequest]:
        """Return a request of retention if a run was refused, once after each run of a fine-tune that ended."""
        if not self.is_full or self.settings.store.keep == Keep():
            return []
        ended = dg.RunsFilter(job_name=process_fine_tune.name, statuses=_ENDED)
        run_key = f"space@{self.instance.get_runs_count(ended)}"
        return [dg.RunRequest(job_name=collect_garbage.name, run_key=run_key)]

    def _left_bytes(self) -> int:
        """Return the free bytes of the store's disk without those that unfinished runs will still write."""
        if self._left is None:
            self._left = self._disk().free - sum(map(self._outstanding, self._unfinished()))
        return self._left

    def _disk(self) -> "_Usage":
        root = self.settings.store_root.absolute()
        return shutil.disk_usage(next(path for path in (root, *root.parents) if path.exists()))

    def _unfinished(self) -> list[dg.RunRecord]:
        found = self.instance.get_run_records(dg.RunsFilter(statuses=UNFINISHED))
        return [each for each in found if PARTITION_TAG in each.dagster_run.tags]

    def _outstanding(self, record: dg.RunRecord) -> int:
        key, since = record.dagster_run.tags[PARTITION_TAG], record.create_timestamp.timestamp()
        written = written_bytes(self.settings.store_root, key, since=since)
        return max(self.outlays.of(key).disk_bytes - written, 0)
