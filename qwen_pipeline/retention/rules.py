"""The rules of retention: for each output, whether it is kept, and why."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_pipeline.audits import sources_of
from qwen_pipeline.checkpoint.store.destinations import LATEST
from qwen_pipeline.config import Settings
from qwen_pipeline.errors import listed
from qwen_pipeline.lineage.library import Sources
from qwen_pipeline.lineage.log_proof import open_log
from qwen_pipeline.lineage.pointers import pointed_releases
from qwen_pipeline.lineage.statements import Statement, statements
from qwen_pipeline.lineage.verification.order import by_digest, find_step, short
from qwen_pipeline.lineage.verification.records import Record, RecordedStep
from qwen_pipeline.retention.outputs import CODE_VERSIONS, Outputs
from qwen_pipeline.stages import quantize, validate

FOREVER, UNTIL_VALIDATED = "forever", "until validated"
Uses = Callable[[str], str]
"""Returns the reason why outputs of a fine-tune are in use; an empty text if they are not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The decision on one output.

    Attributes:
        path: Its directory.
        stage: The stage that made it.
        fine_tune: The fine-tune that it was made for.
        digest: Its content digest.
        nbytes: Bytes that it takes on the disk.
        rule: The setting that decides.
        kept: Why it is kept; empty if it is dropped.
    """

    path: Path
    stage: str
    fine_tune: str
    digest: str
    nbytes: int
    rule: str
    kept: str

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "stage": self.stage,
            "fine_tune": self.fine_tune,
            "digest": self.digest,
            "bytes": self.nbytes,
            "rule": self.rule,
            "kept": self.kept,
        }


def decide(settings: Settings, outputs: Outputs, uses: Uses) -> list[Decision]:
    """Return the decision on every output that a rule does not keep forever, by stage and fine-tune."""
    rules = _rules(settings)
    judge = _Judge(settings, outputs, uses)
    return [
        Decision(
            path=path,
            stage=stage,
            fine_tune=fine_tune,
            digest=outputs.here[path].step.content_digest,
            nbytes=disk_bytes(path),
            rule=f"{_setting(stage)} = {_shown(rule)}",
            kept=judge.reason(path, rank, rule),
        )
        for (stage, fine_tune), paths in sorted(outputs.folders().items())
        if (rule := rules[stage]) != FOREVER
        for path, rank in outputs.ranked(stage, fine_tune, paths)
    ]


def disk_bytes(root: Path) -> int:
    """Return the bytes that the files of a directory take on the disk, without those that have further hard links."""
    files = (path.lstat() for path in root.rglob("*") if not path.is_dir())
    return sum(512 * file.st_blocks for file in files if file.st_nlink == 1)


class _Judge:
    """Reasons to keep the outputs of a store."""

    def __init__(self, settings: Settings, outputs: Outputs, uses: Uses) -> None:
        self.settings, self.outputs, self.uses = settings, outputs, uses
        self.validated = outputs.behind_passed_validations()
        self.pointed = _pointed(outputs.store)
        self.stored: dict[str, set[Path]] = {}
        for path, record in outputs.here.items():
            if record.stored:
                self.stored.setdefault(record.step.content_digest, set()).add(path)
        without_bytes = [*outputs.dropped, *(record for record in outputs.here.values() if not record.stored)]
        self.steps = by_digest(record.step for record in without_bytes)
        self.sources: dict[str, Sources] = {}

    def reason(self, path: Path, rank: int, rule: int | str) -> str:
        """Return why an output is kept; empty if it is dropped."""
        record = self.outputs.here[path]
        return next(filter(None, self._reasons(path, record, rank, rule)), "")

    def _reasons(self, path: Path, record: Record, rank: int, rule: int | str) -> Iterator[str]:
        if isinstance(rule, int):
            yield f"one of the {rule} newest" if rank < rule else ""
            yield "requested last" if rule and _is_latest(path) else ""
        elif record.step.content_digest not in self.validated:
            yield "no validation of it has passed yet"
        yield "" if record.stored else "a recipe, without weights"
        yield self.pointed.get(path.relative_to(self.outputs.store).as_posix(), "")
        yield self.uses(path.parent.name)
        if self.settings.store.keep.irreplaceable and (lost := self._lost(record.step, path)):
            yield f"nothing can make it again: {lost}"

    def _lost(self, step: RecordedStep, near: Path) -> str:
        """Return which inputs of an output are lost, or why the present code makes another; empty if neither."""
        if step.code_version != CODE_VERSIONS[step.stage]:
            return f"code version {step.code_version} of {step.stage} made it, and the present one may give other bytes"
        faults = (self._missing(step, role, digest, near) for role, digest in step.inputs.items())
        return listed([fault for fault in faults if fault])

    def _missing(self, step: RecordedStep, role: str, digest: str, near: Path) -> str:
        """Return which input of a step is not here, and cannot be made again."""
        if self.stored.get(digest, set()) - {near} or (step.stage == validate.STAGE and role == "text"):
            return ""  # the digest of a validation's text is that of tokens, which no file has
        made = find_step(self.steps, digest)
        if made and digest not in made.inputs.values():
            return self._lost(made, near)
        sources = self.sources.setdefault(near.parent.name, sources_of(near, self.settings, None, remembered=True))
        return "" if sources.find(role, digest) else f"{role} {short(digest)} is not here"


def _rules(settings: Settings) -> Mapping[str, int | str]:
    keep = settings.store.keep
    return {stage: getattr(keep, _setting(stage)) for stage in CODE_VERSIONS}


def _setting(stage: str) -> str:
    return quantize.STAGE if stage == quantize.UNPADDED_STAGE else stage


def _shown(rule: int | str) -> str:
    return str(rule) if isinstance(rule, int) else f'"{rule}"'


def _is_latest(path: Path) -> bool:
    links = (link for link in path.parent.glob(f"{LATEST}*") if link.is_symlink())
    return any(link.readlink() == Path(path.name) for link in links)


def _pointed(store: Path) -> Mapping[str, str]:
    """Return each release that a pointer leads to, by its link or by the log -> why it is kept."""
    found = {release: listed(pointers) for release, pointers in pointed_releases(store).items()}
    found |= {each.release: f"{each.product}/{each.pointer}" for each in _last_moves(store)}
    return {release: f"{pointers} leads to it" for release, pointers in found.items()}


def _last_moves(store: Path) -> Iterator[Statement]:
    """Yield the statement that says where each pointer leads, should a link be lost."""
    moves = [each for each in statements(open_log(store).entries) if each.pointer]
    yield from {(each.product, each.pointer): each for each in moves}.values()
