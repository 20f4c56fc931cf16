"""The outputs in a store, and the manifests of those that retention removed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qwen_pipeline.checkpoint.store.canonical import MANIFEST_FILE
from qwen_pipeline.checkpoint.store.destinations import DROPPED, PARTIAL, CheckpointStore
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.lineage.verification.order import makers_of
from qwen_pipeline.lineage.verification.records import Record, RecordedStep, read_record
from qwen_pipeline.reports import load_reports
from qwen_pipeline.stages import calibrate, merge, pad, publish, quantize, validate

CODE_VERSIONS: Mapping[str, str] = {
    **{stage.STAGE: stage.CODE_VERSION for stage in (merge, pad, calibrate, quantize, validate, publish)},
    quantize.UNPADDED_STAGE: quantize.CODE_VERSION,
}
"""The stages whose outputs retention concerns -> the version of their code."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """The outputs of a store.

    Attributes:
        store: The store.
        here: Directory -> its manifest.
        dropped: Manifests of directories that are gone.
        unreadable: Directories whose manifest cannot be read.
    """

    store: Path
    here: Mapping[Path, Record]
    dropped: Iterable[Record]
    unreadable: Iterable[Path] = field(default_factory=tuple[Path, ...])

    def folders(self) -> dict[tuple[str, str], list[Path]]:
        """Return stage and fine-tune -> their directories, the newest first."""
        found: dict[tuple[str, str], list[Path]] = {}
        for path in sorted(self.here, key=self._made, reverse=True):
            found.setdefault((path.parent.parent.name, path.parent.name), []).append(path)
        return found

    def ranked(self, stage: str, fine_tune: str, newest: Sequence[Path]) -> list[tuple[Path, int]]:
        """Return the directories of one stage and fine-tune, the newest first, each with the number of newer ones.

        Only outputs of the same product count as newer; of a directory that several products share, the least counts.
        """
        ranks, store = dict.fromkeys(newest, len(newest)), CheckpointStore(self.store)
        for product in store.products([stage], fine_tune):
            requested = {path.name for path in store.requested(stage, product.key)}
            for rank, path in enumerate(path for path in newest if path.name in requested):
                ranks[path] = min(ranks[path], rank)
        return list(ranks.items())

    def _made(self, path: Path) -> tuple[str, int]:
        """Return when an output was begun, by its manifest, and when it was finished."""
        return str(self.here[path].run.get("started", "")), (path / MANIFEST_FILE).stat().st_mtime_ns

    def records(self) -> Iterator[Record]:
        yield from self.here.values()
        yield from self.dropped

    def behind_passed_validations(self) -> set[str]:
        """Return the content digests that validations which passed descend from."""
        steps: dict[str, list[RecordedStep]] = {}
        for record in self.records():
            steps.setdefault(record.step.content_digest, []).append(record.step)
        frontier, found, seen = [record.step for record in self.records() if _passed(record)], set[str](), set[str]()
        while frontier:
            step = frontier.pop()
            seen.add(step.key)
            for digest in step.made_from.values():
                found.add(digest)
                makers = makers_of(digest, step, steps.get(digest, ()))
                frontier += [maker for maker in makers if maker.key not in seen]
        return found


def open_outputs(store: Path) -> Outputs:
    """Read the manifest of every output of the stages of a fine-tune; links and unfinished directories are left out."""
    here: dict[Path, Record] = {}
    unreadable: list[Path] = []
    for root in _roots(store):
        try:
            here[root] = read_record(root)
        except CheckpointRefused:
            unreadable.append(root)
    dropped: list[Record] = []
    for root in _roots(store / DROPPED):
        if not (store / root.relative_to(store / DROPPED)).exists():
            try:
                dropped.append(read_record(root))
            except CheckpointRefused:
                continue  # an audit names it
    return Outputs(store, here, dropped, unreadable)


def _roots(store: Path) -> Iterator[Path]:
    for stage in CODE_VERSIONS:
        for manifest in sorted((store / stage).glob(f"*/*/{MANIFEST_FILE}")):
            root = manifest.parent
            if not root.is_symlink() and not root.name.endswith(PARTIAL):
                yield root


def _passed(record: Record) -> bool:
    if record.step.stage != validate.STAGE:
        return False
    try:
        return not any(report.blocks for report in load_reports(record.result))
    except CheckpointRefused:
        return False
