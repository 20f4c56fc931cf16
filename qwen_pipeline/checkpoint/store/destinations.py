"""Where outputs live: one directory that the user names, or a place of its own for each derivation below one root."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qwen_pipeline.checkpoint.lazy import MANIFEST
from qwen_pipeline.checkpoint.manifest import (
    Derivation,
    Manifest,
    is_outdated,
    open_manifest,
)
from qwen_pipeline.errors import CheckpointRefused

KEY_LENGTH = 16
"""Hex digits of a derivation key in a path; the manifest holds and checks all 64."""
PARTIAL = ".partial"


class Destination(Protocol):
    """Where an output goes, once it is known what it is derived from."""

    def path_for(self, derivation: Derivation, /) -> Path: ...

    def may_hold(self, stage: str, /) -> bool:
        """Whether an output of a stage may be there, whatever it was derived from."""
        ...

    def arrived(self, path: Path, /) -> None:
        """Called each time a derivation is wanted and its directory is complete, new or not."""
        ...


@dataclass(frozen=True, slots=True)
class Directory(Destination):
    """One directory that the user named. It must be new, empty, or already hold this very derivation."""

    path: Path

    def path_for(self, _: Derivation, /) -> Path:
        return self.path

    def may_hold(self, _: str, /) -> bool:
        return self.path.is_dir() and any(self.path.iterdir())

    def arrived(self, _: Path, /) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Slot(Destination):
    """``<root>/<stage>/<fine-tune>/<key>``, with a link ``latest`` to the one wanted last."""

    root: Path
    fine_tune: str

    def path_for(self, derivation: Derivation, /) -> Path:
        return self.root / derivation.stage / self.fine_tune / derivation.key[:KEY_LENGTH]

    def may_hold(self, stage: str, /) -> bool:
        return any((self.root / stage / self.fine_tune).glob(f"*/{MANIFEST}"))

    def arrived(self, path: Path, /) -> None:
        scratch = path.parent / ".latest.tmp"
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(path.name)
        scratch.replace(path.parent / "latest")


def as_destination(destination: Destination | Path) -> Destination:
    """Return a destination as it is, and a path as the :class:`Directory` that it names."""
    return Directory(destination) if isinstance(destination, Path) else destination


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A finished directory. ``reused`` says that it was already there."""

    path: Path
    manifest: Manifest
    reused: bool = False


@dataclass(frozen=True, slots=True)
class CheckpointStore:
    """Every derivation of every fine-tune below one root."""

    root: Path

    def slot(self, fine_tune: str) -> Slot:
        return Slot(self.root, fine_tune)

    def latest(self, stage: str, fine_tune: str) -> Artifact | None:
        """Return what ``stage`` last produced for a fine-tune, or None; an outdated format counts as nothing."""
        link = self.root / stage / fine_tune / "latest"
        if not link.is_dir() or is_outdated(link):
            return None
        path = link.resolve()
        return Artifact(path=path, manifest=open_manifest(path), reused=True)

    def finished(self, stage: str, fine_tune: str) -> list[Artifact]:
        """Return everything ``stage`` ever finished for a fine-tune and that is still there, oldest first."""
        roots = {path.parent.resolve() for path in (self.root / stage / fine_tune).glob(f"*/{MANIFEST}")}
        whole = [root for root in roots if not root.name.endswith(PARTIAL) and not is_outdated(root)]
        found = [Artifact(path=root, manifest=open_manifest(root), reused=True) for root in whole]
        return sorted(found, key=lambda artifact: artifact.manifest.run.started)

    def require_latest(self, stage: str, fine_tune: str) -> Artifact:
        """Like :meth:`latest`, but its absence is an error."""
        if found := self.latest(stage, fine_tune):
            return found
        raise CheckpointRefused(
            f"There is no {stage} checkpoint of {fine_tune!r} below {self.root}.",
            remedy=f"Run the stages before it: qwen-pipeline run {fine_tune}",
        )
