"""Destinations of outputs: a directory that the user names, or a store with one directory for each derivation."""

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
"""Hex digits of a derivation key in a path; the manifest holds all 64, which are compared."""
PARTIAL = ".partial"


class Destination(Protocol):
    """The place for a stage's output: maps a derivation to the path of its finished directory, for :func:`derive`.

    A :class:`Directory` is one path, for one output. A :class:`Slot` has a path for each derivation of one fine-tune,
    so that earlier outputs stay. While an output is built, ``<path>.partial`` and ``<path>.lock`` are next to its path.
    """

    def path_for(self, derivation: Derivation, /) -> Path:
        """Return the finished directory of a derivation, which need not exist."""
        ...

    def may_hold(self, stage: str, /) -> bool:
        """Return whether an output of a stage may exist, of any derivation."""
        ...

    def on_finished(self, path: Path, /) -> None:
        """Record that the finished directory of a derivation was requested, whether it was built or found."""
        ...


@dataclass(frozen=True, slots=True)
class Directory(Destination):
    """One directory that the user named. It must be absent or empty, or already hold the requested derivation."""

    path: Path

    def path_for(self, _: Derivation, /) -> Path:
        return self.path

    def may_hold(self, _: str, /) -> bool:
        return self.path.is_dir() and any(self.path.iterdir())

    def on_finished(self, _: Path, /) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Slot(Destination):
    """``<root>/<stage>/<fine-tune>/<key>``, with a link ``latest`` to the derivation that was requested last."""

    root: Path
    fine_tune: str

    def path_for(self, derivation: Derivation, /) -> Path:
        return self.root / derivation.stage / self.fine_tune / derivation.key[:KEY_LENGTH]

    def may_hold(self, stage: str, /) -> bool:
        return any((self.root / stage / self.fine_tune).glob(f"*/{MANIFEST}"))

    def on_finished(self, path: Path, /) -> None:
        scratch = path.parent / ".latest.tmp"
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(path.name)
        scratch.replace(path.parent / "latest")


def as_destination(destination: Destination | Path) -> Destination:
    """Return a destination unchanged, and a path as a :class:`Directory`."""
    return Directory(destination) if isinstance(destination, Path) else destination


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A finished directory: the output of one stage.

    Attributes:
        path: The directory.
        manifest: Its manifest, with inputs, digests and the stage's findings.
        reused: Whether it existed already, so that nothing was computed.
    """

    path: Path
    manifest: Manifest
    reused: bool = False


@dataclass(frozen=True, slots=True)
class CheckpointStore:
    """The outputs of every stage for every fine-tune, below one root."""

    root: Path

    def slot(self, fine_tune: str) -> Slot:
        return Slot(self.root, fine_tune)

    def latest(self, stage: str, fine_tune: str) -> Artifact | None:
        """Return the output of ``stage`` last requested for a fine-tune; None if absent or of an older format."""
        link = self.root / stage / fine_tune / "latest"
        if not link.is_dir() or is_outdated(link):
            return None
        path = link.resolve()
        return Artifact(path=path, manifest=open_manifest(path), reused=True)

    def finished(self, stage: str, fine_tune: str) -> list[Artifact]:
        """Return every output of ``stage`` for a fine-tune, oldest first; those of an older format are skipped."""
        roots = {path.parent.resolve() for path in (self.root / stage / fine_tune).glob(f"*/{MANIFEST}")}
        current = [root for root in roots if not root.name.endswith(PARTIAL) and not is_outdated(root)]
        artifacts = [Artifact(path=root, manifest=open_manifest(root), reused=True) for root in current]
        return sorted(artifacts, key=lambda artifact: artifact.manifest.run.started)

    def require_latest(self, stage: str, fine_tune: str) -> Artifact:
        """Return :meth:`latest`.

        Raises:
            CheckpointRefused: There is none.
        """
        if found := self.latest(stage, fine_tune):
            return found
        raise CheckpointRefused(
            f"There is no {stage} checkpoint of {fine_tune!r} below {self.root}.",
            remedy=f"Run the stages before it: qwen-pipeline run {fine_tune}",
        )
