"""Removal of a directory of a store: a kill at any moment leaves either it, or its manifest and a line of the log.

The manifest is copied below ``dropped``, the directory is renamed, the log says so, and then the bytes go. A renamed
directory is never read as finished; the next removal goes on where a killed one stopped.
"""

import hashlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from qwen_pipeline.checkpoint.files import open_locked, sync_directory, write_bytes
from qwen_pipeline.checkpoint.store import log
from qwen_pipeline.checkpoint.store.canonical import MANIFEST_FILE
from qwen_pipeline.checkpoint.store.destinations import DROPPED, PARTIAL
from qwen_pipeline.retention.outputs import CODE_VERSIONS
from qwen_pipeline.retention.rules import Decision, Uses, disk_bytes
from qwen_pipeline.stages import repair

_REMOVING = f".removing{PARTIAL}"
_LOCK = ".lock"
_DAY = 86400


def drop(store: Path, decision: Decision, uses: Uses) -> str:
    """Remove an output, and keep its manifest; return why it was not removed, or an empty text.

    ``uses`` is asked again after the directory was renamed: a run that began meanwhile gets it back.
    """
    path = decision.path
    hidden = path.with_name(path.name + _REMOVING)
    try:
        lock = open_locked(path.with_name(path.name + _LOCK))
    except BlockingIOError:
        return "another process is writing it"
    with lock:
        write_bytes(_tombstone(store, path) / MANIFEST_FILE, (path / MANIFEST_FILE).read_bytes())
        path.rename(hidden)
        sync_directory(path.parent)
        if used := uses(decision.fine_tune):
            hidden.rename(path)
            sync_directory(path.parent)
            return used
        _finish(store, path, hidden, decision.rule)
        path.with_name(path.name + _LOCK).unlink(missing_ok=True)
    return ""


def writing(store: Path, fine_tune: str) -> str:
    """Return which output of a fine-tune another process is writing, for which it may read others; empty if none."""
    for partial in store.glob(f"*/{fine_tune}/*{PARTIAL}"):
        lock = partial.with_name(partial.name.removesuffix(PARTIAL) + _LOCK)
        if not partial.name.endswith(_REMOVING) and lock.exists():
            try:
                open_locked(lock).close()
            except BlockingIOError:
                return f"another process is writing {partial}"
    return ""


def resume(store: Path) -> list[Path]:
    """Finish the removals that were interrupted; return the directories."""
    found: list[Path] = []
    for hidden in _named(store, _REMOVING):
        path = hidden.with_name(hidden.name.removesuffix(_REMOVING))
        _finish(store, path, hidden, "an interrupted removal")
        found.append(path)
    return found


def abandoned(store: Path, *, days: float, uses: Uses) -> Iterator[tuple[Path, int]]:
    """Yield the unfinished directories that nothing has written for some days, and the bytes that they take."""
    oldest = time.time() - days * _DAY
    for partial in _named(store, PARTIAL):
        if not partial.name.endswith(_REMOVING) and _last_written(partial) < oldest and not uses(partial.parent.name):
            yield partial, disk_bytes(partial)


def discard(partial: Path) -> str:
    """Remove an unfinished directory; return why it was not removed, or an empty text."""
    lock = partial.with_name(partial.name.removesuffix(PARTIAL) + _LOCK)
    try:
        held = open_locked(lock)
    except BlockingIOError:
        return "another process is writing it"
    with held:
        hidden = lock.with_name(lock.name.removesuffix(_LOCK) + _REMOVING)
        partial.rename(hidden)
        shutil.rmtree(hidden)
        lock.unlink(missing_ok=True)
    return ""


def remove_stale_locks(store: Path, *, days: float) -> int:
    """Remove the locks of directories that are not there, if nothing holds them; return their number."""
    oldest, removed = time.time() - days * _DAY, 0
    for lock in _named(store, _LOCK):
        path = lock.with_name(lock.name.removesuffix(_LOCK))
        if path.exists() or path.with_name(path.name + PARTIAL).exists() or lock.stat().st_mtime > oldest:
            continue
        try:
            with open_locked(lock):
                lock.unlink()
                removed += 1
        except BlockingIOError:
            continue
    return removed


def _named(store: Path, suffix: str) -> list[Path]:
    """Return every path with a suffix beside the outputs of every stage."""
    stages = (*CODE_VERSIONS, repair.STAGE)
    return sorted(path for stage in stages for path in (store / stage).glob(f"*/*{suffix}"))


def _finish(store: Path, path: Path, hidden: Path, rule: str) -> None:
    """Log a removal, unless it is logged, and delete the bytes."""
    tombstone = _tombstone(store, path) / MANIFEST_FILE
    if tombstone.is_file():
        name = path.relative_to(store).as_posix()
        sha256 = hashlib.sha256(tombstone.read_bytes()).hexdigest()
        if not any(each.event == "dropped" and each.manifest_sha256 == sha256 for each in log.read_log(store)):
            log.append(store, "dropped", name, sha256, rule)
    shutil.rmtree(hidden)


def _tombstone(store: Path, path: Path) -> Path:
    return store / DROPPED / path.relative_to(store)


def _last_written(root: Path) -> float:
    return max((path.lstat().st_mtime for path in (root, *root.rglob("*"))), default=0.0)
