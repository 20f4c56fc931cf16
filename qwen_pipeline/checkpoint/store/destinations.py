"""Destinations of outputs: a directory that the user names, or a store with one directory for each derivation."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qwen_pipeline.checkpoint.files import open_locked
from qwen_pipeline.checkpoint.lazy import MANIFEST
from qwen_pipeline.checkpoint.manifest import (
    Derivation,
    Manifest,
    is_outdated,
    open_manifest,
)
from qwen_pipeline.checkpoint.store import log
from qwen_pipeline.checkpoint.store.products import DEFAULT_RECIPE, Product, product
from qwen_pipeline.errors import CheckpointRefused

KEY_LENGTH = 16
"""Hex digits of a derivation key in a path; the manifest holds all 64, which are compared."""
PARTIAL = ".partial"
DROPPED = "dropped"
"""The folder of the manifests of directories that retention removed: ``dropped/<stage>/<fine-tune>/<key>``."""
LATEST = "latest"
"""Name of the link to the output that was requested last; that of another recipe ends in ``@<recipe>``."""


class Destination(Protocol):
    """The place for a stage's output: maps a derivation to the path of its finished directory, for :func:`derive`.

    A :class:`Directory` is one path, for one output. A :class:`Slot` has a path for each derivation of one fine-tune,
    so that earlier outputs stay, and a log of them. While an output is built, ``<path>.partial`` and ``<path>.lock``
    are next to its path.
    """

    def path_for(self, derivation: Derivation, /) -> Path:
        """Return the finished directory of a derivation, which need not exist."""
        ...

    def may_hold(self, stage: str, /) -> bool:
        """Return whether an output of a stage may exist, of any derivation."""
        ...

    def on_finished(self, path: Path, /, *, made: bool) -> None:
        """Record that the finished directory of a derivation was requested; ``made`` if it was built just now."""
        ...


@dataclass(frozen=True, slots=True)
class Directory(Destination):
    """One directory that the user named. It must be absent or empty, or already hold the requested derivation."""

    path: Path

    def path_for(self, _: Derivation, /) -> Path:
        return self.path

    def may_hold(self, _: str, /) -> bool:
        return self.path.is_dir() and any(self.path.iterdir())

    def on_finished(self, _: Path, /, *, made: bool) -> None:  # noqa: ARG002
        return None


@dataclass(frozen=True, slots=True)
class Slot(Destination):
    """``<root>/<stage>/<fine-tune>/<key>``, with a link ``latest`` to the derivation that was requested last.

    The recipes of a fine-tune share its outputs: what several of them need is made once. Each has a link of its own,
    ``latest@<recipe>``, and a link ``<key>@<recipe>`` beside each output that it requested. Where only the default
    recipe is used there are no such links, and every output is its own. What is made ``beside`` is not the latest.
    """

    root: Path
    product: Product
    beside: bool = False

    def path_for(self, derivation: Derivation, /) -> Path:
        return self._outputs(derivation.stage) / derivation.key[:KEY_LENGTH]

    def may_hold(self, stage: str, /) -> bool:
        return any(self._outputs(stage).glob(f"*/{MANIFEST}"))

    def on_finished(self, path: Path, /, *, made: bool) -> None:
        if made or not log.is_recorded(self.root, path):
            log.record(self.root, path, "finished")
        is_marked = any(path.parent.glob(f"{path.name}@*"))
        if self.product.recipe and not made and not is_marked:
            _link(path, path.name + Product(self.product.fine_tune).mark)
        if self.product.recipe or is_marked:
            _link(path, path.name + self.product.mark)
        if not self.beside:
            _link(path, LATEST + self.product.suffix)

    def _outputs(self, stage: str) -> Path:
        return self.root / stage / self.product.fine_tune


def _link(path: Path, name: str) -> None:
    """Make or move a link beside a directory that leads to it, in one step; others may do so at the same time."""
    with open_locked(path.parent / "links.lock", wait=True):
        scratch = path.parent / f".{name}.tmp"
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(path.name)
        scratch.replace(path.parent / name)


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
    """The outputs of every stage for every product, below one root.

    Products are given by their keys: the name of a fine-tune, with ``@<recipe>`` unless its recipe is the default one.
    """

    root: Path

    def slot(self, key: str) -> Slot:
        return Slot(self.root, product(key))

    def link(self, stage: str, key: str) -> Path:
        """Return the link to the output of ``stage`` last requested for a product, which need not exist."""
        return self._outputs(stage, key) / (LATEST + product(key).suffix)

    def latest(self, stage: str, key: str) -> Artifact | None:
        """Return the output of ``stage`` last requested for a product; None if absent or of an older format."""
        link = self.link(stage, key)
        if not link.is_dir() or is_outdated(link):
            return None
        path = link.resolve()
        return Artifact(path=path, manifest=open_manifest(path), reused=True)

    def last_dropped(self, stage: str, key: str) -> Artifact | None:
        """Return the output last requested for a product if retention removed it: its manifest, without bytes."""
        link = self.link(stage, key)
        if not link.is_symlink() or link.exists():
            return None
        root = self.root / DROPPED / stage / product(key).fine_tune / link.readlink()
        if not (root / MANIFEST).is_file() or is_outdated(root):
            return None
        return Artifact(path=root, manifest=open_manifest(root), reused=True)

    def finished(self, stage: str, key: str) -> list[Artifact]:
        """Return every output of ``stage`` that a product requested, oldest first; older formats are skipped."""
        current = [root for root in self.requested(stage, key) if not is_outdated(root)]
        artifacts = [Artifact(path=root, manifest=open_manifest(root), reused=True) for root in current]
        return sorted(artifacts, key=lambda artifact: artifact.manifest.run.started)

    def products(self, stages: Iterable[str], fine_tune: str = "*") -> set[Product]:
        """Return every product, or those of one fine-tune, that a stage has made or is making an output for."""
        found: set[Product] = set()
        for outputs in (path for stage in stages for path in (self.root / stage).glob(fine_tune)):
            recipes = {product(link.name).recipe for link in outputs.glob(f"{LATEST}*") if link.is_symlink()}
            found |= {Product(outputs.name, recipe) for recipe in recipes or {None}}
        return found

    def require_latest(self, stage: str, key: str) -> Artifact:
        """Return :meth:`latest`.

        Raises:
            CheckpointRefused: There is none.
        """
        if found := self.latest(stage, key):
            return found
        raise CheckpointRefused(
            f"There is no {stage} checkpoint of {key!r} below {self.root}.",
            remedy=f"Run the stages before it: qwen-pipeline run {product(key).arguments}",
        )

    def _outputs(self, stage: str, key: str) -> Path:
        return self.root / stage / product(key).fine_tune

    def requested(self, stage: str, key: str) -> set[Path]:
        """Return the directories that a product requested; the default recipe's are those without a mark too."""
        outputs, mark = self._outputs(stage, key), product(key).mark
        marked = {path.parent.name for path in outputs.glob(f"*@*/{MANIFEST}")}
        names = {name.removesuffix(mark) for name in marked if name.endswith(mark) and not name.startswith(LATEST)}
        if mark.endswith(DEFAULT_RECIPE):
            every = {path.parent.name for path in outputs.glob(f"*/{MANIFEST}")} - marked - {LATEST}
            names |= {name for name in every if not any(each.startswith(f"{name}@") for each in marked)}
        return {(outputs / name).resolve() for name in names if not name.endswith(PARTIAL)}
