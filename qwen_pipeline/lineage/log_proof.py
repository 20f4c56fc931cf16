"""Proofs from the log of a store: nothing in it was changed, and manifests are those that were written."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_pipeline.checkpoint.store.canonical import MANIFEST_FILE
from qwen_pipeline.checkpoint.store.destinations import DROPPED
from qwen_pipeline.checkpoint.store.log import HEAD, LOG, START, Entry, read_log, stated_head
from qwen_pipeline.errors import listed
from qwen_pipeline.lineage.library import located
from qwen_pipeline.lineage.statements import reason_of
from qwen_pipeline.lineage.verification.findings import Finding

CHAIN, MANIFESTS, ANCHOR = "log_is_unbroken", "manifests_are_logged", "log_is_that_of_signing"
REMOVALS = "removals_are_logged"
_WITH_MANIFEST = ("finished", "materialized")


@dataclass(frozen=True, slots=True)
class StoreLog:
    """The log of a store, read once.

    Attributes:
        store: The store.
        entries: Its lines.
        fault: Why the log is not what was written; empty if every line fits the one before.
    """

    store: Path
    entries: Sequence[Entry]
    fault: str = ""

    def manifest_sha256(self, root: Path) -> str | None:
        """Return the SHA-256 of a directory's manifest when it was written; None if the log does not know it.

        A directory that retention removed has its manifest below ``dropped``.
        """
        stated = [each for each in self._lines_of(root) if each.event in _WITH_MANIFEST]
        return stated[-1].manifest_sha256 if stated else None

    def has_dropped(self, root: Path) -> bool:
        """Return whether the last line about a directory that retention removed says so."""
        events = [each.event for each in self._lines_of(root) if each.event in (*_WITH_MANIFEST, "dropped")]
        return events[-1:] == ["dropped"]

    def _lines_of(self, root: Path) -> list[Entry]:
        path = located(root).relative_to(self.store.resolve()).as_posix().removeprefix(f"{DROPPED}/")
        return [each for each in self.entries if each.path == path]

    @property
    def recalled(self) -> dict[str, str]:
        """Content digest -> reason, of each recall; it counts whether it is signed or not."""
        return {entry.path: reason_of(entry) for entry in self.entries if entry.event == "recalled"}


def open_log(store: Path) -> StoreLog:
    """Read a store's log and compare each line with the one before."""
    entries: list[Entry] = []
    try:
        for entry in read_log(store):
            expected = entries[-1].digest if entries else START
            if entry.number != len(entries) + 1 or entry.previous != expected:
                fault = f"line {len(entries) + 1} of {LOG} does not continue the line before it"
                return StoreLog(store, entries, fault)
            entries.append(entry)
        return StoreLog(store, entries, _lost_end(entries, stated_head(store)))
    except ValueError as error:
        return StoreLog(store, entries, f"{LOG}: {error}")


def _lost_end(entries: Sequence[Entry], stated: tuple[int, str] | None) -> str:
    """Return how the end of a log differs from the stated one; empty if it does not."""
    number, digest = stated or (0, "")
    if number > len(entries):
        return f"{HEAD} states {number} lines, {LOG} has {len(entries)}: lines were removed"
    if number and entries[number - 1].digest != digest:
        return f"line {number} of {LOG} is not the one that {HEAD} states"
    return ""


def prove_log(log: StoreLog, roots: Sequence[Path]) -> list[Finding]:
    """Return whether the log is unbroken, and whether the manifests of directories are those that it recorded."""
    if log.fault:
        return [Finding(name=CHAIN, verdict="refuted", detail=f"{log.fault}.")]
    if not (log.store / LOG).is_file():
        return [Finding(name=CHAIN, verdict="claimed", detail=f"The store {log.store} has no {LOG}.")]
    chain = _chain(log)
    stated = {root: log.manifest_sha256(root) for root in roots}
    changed = [root for root, sha256 in stated.items() if sha256 and sha256 != _sha256(root / MANIFEST_FILE)]
    if changed:
        detail = f"{changed[0] / MANIFEST_FILE} was changed after {LOG} recorded it."
        return [chain, Finding(name=MANIFESTS, verdict="refuted", detail=detail)]
    known = sum(sha256 is not None for sha256 in stated.values())
    others = "." if known == len(roots) else "; it does not know the others."
    detail = f"{known} of {len(roots)} manifests are those that {LOG} recorded{others}"
    return [chain, Finding(name=MANIFESTS, verdict="proven" if known == len(roots) else "claimed", detail=detail)]


def _chain(log: StoreLog) -> Finding:
    detail = f"{len(log.entries)} lines of {LOG} continue each other"
    if (log.store / HEAD).is_file():
        return Finding(name=CHAIN, verdict="proven", detail=f"{detail}, up to the one that {HEAD} states.")
    return Finding(name=CHAIN, verdict="claimed", detail=f"{detail}; without {HEAD}, further ones may be lost.")


def prove_removals(log: StoreLog, fine_tune: str) -> list[Finding]:
    """Return whether each output of a fine-tune that the log recorded is here, or was removed by retention."""
    last = {
        each.path: each
        for each in log.entries
        if each.event in (*_WITH_MANIFEST, "dropped") and each.path.split("/")[1:2] == [fine_tune]
    }
    if log.fault or not last:
        return []
    kept = [path for path, entry in last.items() if entry.event in _WITH_MANIFEST]
    if gone := [path for path in kept if not (log.store / path / MANIFEST_FILE).is_file()]:
        detail = f"{LOG} recorded {listed(gone)}, which something else than retention removed."
        return [Finding(name=REMOVALS, verdict="claimed", detail=detail)]
    detail = f"{len(kept)} outputs that {LOG} recorded are here; retention dropped {len(last) - len(kept)}."
    return [Finding(name=REMOVALS, verdict="proven", detail=detail)]


def prove_anchor(log: StoreLog, lines: int, digest: str) -> Finding:
    """Return whether a log still has the line that a signature states as its last one at the time."""
    if lines == 0 or (lines <= len(log.entries) and log.entries[lines - 1].digest == digest):
        detail = f"The signed provenance states line {lines} of {LOG}, which is still there."
        return Finding(name=ANCHOR, verdict="proven", detail=detail)
    detail = f"The signed provenance states another line {lines} of {LOG}: the log was written anew or cut off."
    return Finding(name=ANCHOR, verdict="refuted", detail=detail)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
