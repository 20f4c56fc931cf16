"""Events for a data catalogue, one after the other as outputs are finished, from the store's log and manifests."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from qwen_pipeline.checkpoint.store.destinations import DROPPED
from qwen_pipeline.checkpoint.store.follow import follow
from qwen_pipeline.config import Settings
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.lineage.openlineage import emitting, events_of
from qwen_pipeline.lineage.verification.records import Record, read_record

RECORD = "openlineage.json"
"""In the workspace: the number of the last line that was emitted."""


def emit_new(settings: Settings) -> list[str]:
    """Emit the events of each output finished since the last call, in the first call of all; return their names.

    An output that is gone without its manifest has none.

    Raises:
        EnvironmentFault: An event was not accepted; the next call continues with it.
    """
    store, place = settings.store_root, settings.openlineage
    emitted: list[str] = []
    names: dict[str, str] = {}
    with emitting(url=place.url, endpoint=place.endpoint, file=place.file) as emit:
        for entry in follow(store, settings.workspace / RECORD, from_start=True):
            if entry.event != "finished" or not (record := _record(store, entry.path)):
                continue
            names = names or dict(_names(store))
            name = entry.path.rpartition("/")[0]
            for event in events_of(record, name, names, place.namespace):
                emit(event)
            emitted.append(f"{name} {record.step.key[:16]}")
    return emitted


def _record(store: Path, path: str) -> Record | None:
    for root in (store / path, store / DROPPED / path):
        with suppress(CheckpointRefused):
            return read_record(root)
    return None


def _names(store: Path) -> Iterator[tuple[str, str]]:
    """Yield the content digest of each output and the name of its dataset, ``<stage>/<fine-tune>``."""
    for manifest in (*store.glob(f"{DROPPED}/*/*/*/manifest.json"), *store.glob("*/*/*/manifest.json")):
        if not manifest.parent.is_symlink():
            with suppress(CheckpointRefused):
                digest = read_record(manifest.parent).step.content_digest
                yield digest, "/".join(manifest.parts[-4:-2])
