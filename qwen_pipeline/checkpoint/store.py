"""Derivations: where a stage's output lives, how it comes into being, and why a second run is free.

An output directory appears under its name only when it is complete: it is built as ``<name>.partial`` under a lock,
synced, given its manifest last, and renamed. Nothing is ever overwritten.
"""

import errno
import fcntl
import json
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qwen_pipeline.checkpoint.digest import contents_of, digest_files
from qwen_pipeline.checkpoint.lazy import CONFIG, MANIFEST, open_checkpoint
from qwen_pipeline.checkpoint.manifest import Contents, Derivation, Manifest, RunFigures, dump_manifest, open_manifest
from qwen_pipeline.checkpoint.measure import measured
from qwen_pipeline.checkpoint.writer import JOURNAL, sync_directory, write_bytes
from qwen_pipeline.errors import CheckpointRefused, DestinationLocked, DestinationRefused, EnvironmentFault

KEY_LENGTH = 16
"""Hex digits of a derivation key in a path; the manifest holds and checks all 64."""
PARTIAL = ".partial"
_DERIVATION = ".derivation"


class Destination(Protocol):
    """Where an output goes, once it is known what it is derived from."""

    def path_for(self, derivation: Derivation, /) -> Path: ...

    def arrived(self, path: Path, /) -> None:
        """Called each time a derivation is wanted and its directory is complete, new or not."""
        ...


@dataclass(frozen=True, slots=True)
class Directory(Destination):
    """One directory that the user named. It must be new, empty, or already hold this very derivation."""

    path: Path

    def path_for(self, _: Derivation, /) -> Path:
        return self.path

    def arrived(self, _: Path, /) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Slot(Destination):
    """``<root>/<stage>/<fine-tune>/<key>``, with a link ``latest`` to the one wanted last."""

    root: Path
    fine_tune: str

    def path_for(self, derivation: Derivation, /) -> Path:
        return self.root / derivation.stage / self.fine_tune / derivation.key[:KEY_LENGTH]

    def arrived(self, path: Path, /) -> None:
        scratch = path.parent / ".latest.tmp"
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(path.name)
        scratch.replace(path.parent / "latest")


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A finished directory. ``reused`` says that it was already there."""

    path: Path
    manifest: Manifest
    reused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What a build hands over: digests of what it wrote, what it found out, and the peak memory of its workers."""

    contents: Contents
    result: Mapping[str, Any] = field(default_factory=dict[str, Any])
    worker_peak_bytes: int = 0


@dataclass(frozen=True, slots=True)
class CheckpointStore:
    """Every derivation of every fine-tune below one root."""

    root: Path

    def slot(self, fine_tune: str) -> Slot:
        return Slot(self.root, fine_tune)

    def latest(self, stage: str, fine_tune: str) -> Artifact | None:
        """Return what ``stage`` last produced for a fine-tune, or None."""
        link = self.root / stage / fine_tune / "latest"
        if not link.is_dir():
            return None
        path = link.resolve()
        return Artifact(path=path, manifest=open_manifest(path), reused=True)

    def finished(self, stage: str, fine_tune: str) -> list[Artifact]:
        """Return everything ``stage`` ever finished for a fine-tune and that is still there, oldest first."""
        roots = {path.parent.resolve() for path in (self.root / stage / fine_tune).glob(f"*/{MANIFEST}")}
        whole = [root for root in roots if not root.name.endswith(PARTIAL)]
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


def derive(derivation: Derivation, destination: Destination, build: Callable[[Path], Built]) -> Artifact:
    """Return the finished directory of a derivation, building it only if it is not there.

    ``build`` writes into the partial directory it is given, which may hold an interrupted attempt at the same
    derivation.

    Raises:
        DestinationRefused: The directory holds something else.
        DestinationLocked: Another process is building it.
        EnvironmentFault: The disk is full.
    """
    out = destination.path_for(derivation)
    artifact = _finished(out, derivation) or _build_under_lock(out, derivation, build)
    destination.arrived(artifact.path)
    return artifact


def contents_of_directory(root: Path) -> Contents:
    """Hash a directory that a library wrote: all files, and each tensor of a checkpoint if it is one."""
    files = {
        path.relative_to(root).as_posix(): path
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.name != MANIFEST
    }
    has_weights = CONFIG in files and any(path.endswith(".safetensors") for path in files)
    return Contents(
        tensors=contents_of(open_checkpoint(root), root).tensors if has_weights else {}, files=digest_files(files)
    )


def require_intact(root: Path) -> Manifest:
    """Read every file of a finished directory and compare it with the manifest.

    Raises:
        CheckpointRefused: A file is missing, was added or has other bytes.
    """
    manifest = open_manifest(root)
    expected = manifest.contents.files
    found = contents_of_directory(root).files
    if wrong := sorted(path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path)):
        raise CheckpointRefused(
            f"{root} is not what its manifest says; these files differ: {', '.join(wrong[:5])}.",
            remedy="Delete the directory and run its stage again; the result is the same.",
        )
    return manifest


def _finished(out: Path, derivation: Derivation) -> Artifact | None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise DestinationRefused(
            f"{out} exists, is not empty and was not made by this pipeline.",
            remedy="Choose a new or an empty directory.",
        )
    manifest = open_manifest(out)
    if manifest.derivation.key != derivation.key:
        raise DestinationRefused(
            f"{out} holds {_difference(manifest.derivation, derivation)}.",
            remedy="Choose another directory, or delete this one.",
        )
    for path, file in manifest.contents.files.items():
        if not (out / path).is_file() or (out / path).stat().st_size != file.bytes:
            raise CheckpointRefused(
                f"{out / path} is missing or has another size than the manifest's {file.bytes:,} bytes.",
                remedy="Delete the directory and run its stage again; the result is the same.",
            )
    return Artifact(path=out, manifest=manifest, reused=True)


def _build_under_lock(out: Path, derivation: Derivation, build: Callable[[Path], Built]) -> Artifact:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + PARTIAL)
    with _lock(out), _disk_faults(partial):
        if found := _finished(out, derivation):
            return found
        _prepare(partial, derivation)
        if not (partial / MANIFEST).is_file():
            with measured() as figures:
                built = build(partial)
            _seal(partial, derivation, built, figures(worker_peak_bytes=built.worker_peak_bytes))
        for scratch in (_DERIVATION, JOURNAL):
            (partial / scratch).unlink(missing_ok=True)
        partial.rename(out)
        sync_directory(out.parent)
    return Artifact(path=out, manifest=open_manifest(out))


def _prepare(partial: Path, derivation: Derivation) -> None:
    """Keep an interrupted attempt at the same derivation, discard one at another."""
    label = partial / _DERIVATION
    if partial.exists() and not (label.is_file() and label.read_text() == derivation.key):
        shutil.rmtree(partial)
    partial.mkdir(exist_ok=True)
    write_bytes(label, derivation.key.encode())


def _seal(partial: Path, derivation: Derivation, built: Built, run: RunFigures) -> None:
    manifest = Manifest(
        derivation=derivation,
        contents=built.contents,
        content_digest=built.contents.digest,
        result=built.result,
        run=run,
    )
    write_bytes(partial / MANIFEST, dump_manifest(manifest))


@contextmanager
def _lock(out: Path) -> Generator[None, None, None]:
    with out.with_name(out.name + ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DestinationLocked(
                f"Another process is writing {out}.", remedy="Wait for it to end, or end it, then run again."
            ) from error
        yield


@contextmanager
def _disk_faults(partial: Path) -> Generator[None, None, None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise EnvironmentFault(
            f"The disk of {partial} is full ({error.strerror}).",
            remedy="Free space and run again: finished shards are kept.",
        ) from error


def _difference(found: Derivation, wanted: Derivation) -> str:
    if found.stage != wanted.stage:
        return f"a {found.stage} checkpoint, not a {wanted.stage} one"
    for what, have, want in (
        ("other inputs", found.inputs, wanted.inputs),
        ("another spec", found.spec, wanted.spec),
        ("the work of another code version", found.code_version, wanted.code_version),
    ):
        if have != want:
            return f"a {found.stage} checkpoint of {what}: {json.dumps(have)}, wanted {json.dumps(want)}"
    return "another derivation"
