"""Readers of a store's log that continue where they stopped, each with a file that holds the last line it took."""

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from qwen_pipeline.checkpoint.files import load_json, open_locked, write_bytes
from qwen_pipeline.checkpoint.store.log import Entry, head, read_log
from qwen_pipeline.errors import CheckpointRefused


def follow(store: Path, record: Path, *, from_start: bool = False) -> Generator[Entry]:
    """Yield each line since the last one that was taken; a line is taken when the caller asks for the next.

    So a line whose handling fails is yielded again by the next call. Callers take turns.

    Args:
        store: The store.
        record: The reader's file.
        from_start: Whether a new reader begins with the first line, and not after the last one.

    Raises:
        CheckpointRefused: The log has a line that cannot be read.
    """
    with _locked(store, record, from_start=from_start):
        taken = int(load_json(record)["line"])
        try:
            new = [entry for entry in read_log(store) if entry.number > taken]
        except ValueError as error:
            raise CheckpointRefused(
                f"The log of {store} was changed: {error}.", remedy="Restore it from a backup."
            ) from error
        for entry in new:
            yield entry
            _keep(record, entry.number)


def begin_following(store: Path, record: Path) -> None:
    """Have a new reader begin after the present last line."""
    with _locked(store, record, from_start=False):
        pass


@contextmanager
def _locked(store: Path, record: Path, *, from_start: bool) -> Generator[None]:
    record.parent.mkdir(parents=True, exist_ok=True)
    with open_locked(record.with_suffix(".lock"), wait=True):
        if not record.is_file():
            _keep(record, 0 if from_start else head(store)[0])
        yield


def _keep(record: Path, line: int) -> None:
    write_bytes(record, json.dumps({"line": line}).encode())
