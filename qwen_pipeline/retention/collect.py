"""Retention as one function: interrupted removals are finished, and what no rule keeps is removed."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.files import open_locked
from qwen_pipeline.checkpoint.store.destinations import DROPPED
from qwen_pipeline.config import Settings
from qwen_pipeline.errors import CheckpointRefused, DestinationLocked
from qwen_pipeline.lineage.log_proof import open_log
from qwen_pipeline.progress import Observe, Progress, unobserved
from qwen_pipeline.retention.outputs import open_outputs
from qwen_pipeline.retention.remove import abandoned, discard, drop, remove_stale_locks, resume, writing
from qwen_pipeline.retention.rules import Decision, Uses, decide


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """The result of a collection.

    Attributes:
        dry_run: Whether nothing was removed.
        dropped: Outputs that were removed, or would be.
        kept: Outputs that a rule would drop, and that something keeps.
        abandoned: Unfinished directories that were removed, or would be -> bytes.
        resumed: Directories whose removal had been interrupted.
        unreadable: Directories that are kept because their manifest cannot be read.
        locks: Number of stale locks that were removed.
    """

    dry_run: bool
    dropped: Sequence[Decision]
    kept: Sequence[Decision]
    abandoned: Mapping[Path, int] = field(default_factory=dict[Path, int])
    resumed: Sequence[Path] = ()
    unreadable: Sequence[Path] = ()
    locks: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes on the disk of what was removed, or would be."""
        return sum(each.nbytes for each in self.dropped) + sum(self.abandoned.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "dry_run": self.dry_run,
            "bytes": self.nbytes,
            "dropped": [each.to_json() for each in self.dropped],
            "kept": [each.to_json() for each in self.kept],
            "abandoned": [str(path) for path in self.abandoned],
            "resumed": [str(path) for path in self.resumed],
            "unreadable": [str(path) for path in self.unreadable],
            "locks": self.locks,
        }


def collect(settings: Settings, *, uses: Uses, dry_run: bool = False, observe: Observe = unobserved) -> Collection:
    """Remove what no rule of ``[store.keep]`` keeps; what is removed keeps its manifest, and can be made again.

    Args:
        settings: The settings.
        uses: Returns why outputs of a fine-tune are in use; an empty text if they are not.
        dry_run: Whether nothing is removed.
        observe: Called with the bytes removed.

    Raises:
        CheckpointRefused: The log of the store was changed.
        DestinationLocked: Another process is removing outputs.
    """
    store = settings.store_root
    if fault := open_log(store).fault:
        raise CheckpointRefused(
            f"Nothing is removed: the log of {store} was changed: {fault}.",
            remedy="Restore it from a backup; or move it away, which starts a new one, and audits name the gap.",
        )
    if dry_run or not store.is_dir():
        return _planned(settings, uses)
    with _only_collection(store):
        resumed = resume(store)
        planned = _planned(settings, uses)
        kept, done = list(planned.kept), list[Decision]()
        for decision in _largest_first(planned.dropped):
            fault = drop(store, decision, _or_written(store, uses))
            (kept if fault else done).append(replace(decision, kept=fault))
            freed = sum(each.nbytes for each in done)
            observe(Progress(task="gc", done=freed, total=planned.nbytes, unit="bytes"))
        partials = {partial: nbytes for partial, nbytes in planned.abandoned.items() if not discard(partial)}
        return replace(
            planned,
            dry_run=False,
            dropped=done,
            kept=kept,
            abandoned=partials,
            resumed=resumed,
            locks=remove_stale_locks(store, days=settings.store.keep.partial_days),
        )


def _planned(settings: Settings, uses: Uses) -> Collection:
    outputs = open_outputs(settings.store_root)
    decisions = decide(settings, outputs, _or_written(outputs.store, uses))
    return Collection(
        dry_run=True,
        dropped=[each for each in decisions if not each.kept],
        kept=[each for each in decisions if each.kept],
        abandoned=dict(abandoned(settings.store_root, days=settings.store.keep.partial_days, uses=uses)),
        unreadable=list(outputs.unreadable),
    )


def _or_written(store: Path, uses: Uses) -> Uses:
    return lambda fine_tune: uses(fine_tune) or writing(store, fine_tune)


@contextmanager
def _only_collection(store: Path) -> Generator[None]:
    (store / DROPPED).mkdir(exist_ok=True)
    try:
        lock = open_locked(store / DROPPED / ".lock")
    except BlockingIOError as error:
        raise DestinationLocked(
            f"Another process is removing outputs of {store}.", remedy="Wait for it to end."
        ) from error
    with lock:
        yield


def _largest_first(decisions: Sequence[Decision]) -> list[Decision]:
    """Return the decisions with the largest outputs first, so that space is freed as early as possible."""
    return sorted(decisions, key=lambda each: -each.nbytes)
