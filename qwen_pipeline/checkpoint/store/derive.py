"""Derivations: where a stage's output lives, how it comes into being, and why a second run is free.

An output directory appears under its name only when it is complete: it is built as ``<name>.partial`` under a lock,
synced, given its manifest last, and renamed. What an attempt resumes from stays until the manifest is there: killed at
any moment, the next one goes on. Nothing is ever overwritten.
"""

import errno
import fcntl
import json
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.files import sync_directory, write_bytes
from qwen_pipeline.checkpoint.journal import JOURNAL
from qwen_pipeline.checkpoint.lazy import MANIFEST
from qwen_pipeline.checkpoint.manifest import (
    FORMAT,
    Contents,
    Derivation,
    Manifest,
    RunFigures,
    dump_manifest,
    open_manifest,
)
from qwen_pipeline.checkpoint.measure import measured
from qwen_pipeline.checkpoint.store.destinations import PARTIAL, Artifact, Destination, as_destination
from qwen_pipeline.errors import CheckFailed, CheckpointRefused, DestinationLocked, DestinationRefused, EnvironmentFault

WORK_DIR = ".workshop"
"""Where a build keeps what it resumes from, within the partial directory; gone before that gets its name."""
_DERIVATION = ".derivation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What a build hands over: digests of what it wrote, what it found out, and the peak memory of its workers.

    Attributes:
        inputs: Digests of the inputs that were not known before the work.
        recipe: See :class:`Manifest`.
    """

    contents: Contents
    result: Mapping[str, Any] = field(default_factory=dict[str, Any])
    worker_peak_bytes: int = 0
    inputs: Mapping[str, str] = field(default_factory=dict[str, str])
    recipe: Mapping[str, str] | None = None


def derive(
    derivation: Derivation,
    destination: Destination | Path,
    build: Callable[[Path], Built],
    *,
    appearance: Mapping[str, str] | None = None,
) -> Artifact:
    """Return the finished directory of a derivation, building it only if it is not there.

    ``build`` writes into the partial directory it is given, which may hold an interrupted attempt at the same
    derivation.

    Args:
        derivation: What is wanted. An input may be :data:`UNREAD`; the build then says what it was.
        destination: Where it goes; a path names one directory.
        build: Makes it.
        appearance: Role -> what an input looks like from outside. Attempts are told apart by it, so that an interrupted
            one is continued whether or not the digest of the input has become known meanwhile.

    Raises:
        DestinationRefused: The directory holds something else.
        DestinationLocked: Another process is building it.
        EnvironmentFault: The disk is full.
    """
    destination = as_destination(destination)
    artifact = find(derivation, destination)
    if not artifact:
        attempt = replace(derivation, inputs={**derivation.inputs, **(appearance or {})})
        artifact = _build_under_lock(attempt, derivation, destination, build)
    destination.arrived(artifact.path)
    return artifact


def fill_in(root: Path, build: Callable[[Path], Contents]) -> Artifact:
    """Have the weights of a recipe written beside it; its manifest says so last, in one step.

    Raises:
        CheckFailed: Other weights came out than the manifest promises.
        DestinationLocked: Another process is at it.
    """
    with _lock(root), _disk_faults(root):
        manifest = open_manifest(root)
        with measured() as figures:
            contents = build(root)
        if contents.digest != manifest.content_digest:
            raise CheckFailed(
                f"{root} gives {contents.digest}, where its manifest promises {manifest.content_digest}.",
                remedy="Compute it where its recipe was made: another processor or torch may round differently.",
            )
        stored = replace(manifest, contents=contents, recipe=None, run=figures())
        write_bytes(root / MANIFEST, dump_manifest(stored))
        (root / JOURNAL).unlink(missing_ok=True)
        return Artifact(path=root, manifest=stored)


def find(derivation: Derivation, destination: Destination) -> Artifact | None:
    """Return the finished directory of a derivation, if every input of it is known and it is there."""
    return _finished(destination.path_for(derivation), derivation) if derivation.is_settled else None


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


def _build_under_lock(
    attempt: Derivation, derivation: Derivation, destination: Destination, build: Callable[[Path], Built]
) -> Artifact:
    place = destination.path_for(attempt)
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(place.name + PARTIAL)
    with _lock(place), _disk_faults(partial):
        if found := find(derivation, destination):
            return found
        _prepare(partial, attempt)
        if not (partial / MANIFEST).is_file():
            with measured() as figures:
                built = build(partial)
            _seal(partial, derivation, built, figures(worker_peak_bytes=built.worker_peak_bytes))
        return _reveal(partial, destination)


def _prepare(partial: Path, attempt: Derivation) -> None:
    """Keep an interrupted attempt at the same derivation, discard one at another."""
    label, wanted = partial / _DERIVATION, f"{FORMAT} {attempt.key}"
    if partial.exists() and not (label.is_file() and label.read_text() == wanted):
        shutil.rmtree(partial)
    partial.mkdir(exist_ok=True)
    write_bytes(label, wanted.encode())


def _seal(partial: Path, derivation: Derivation, built: Built, run: RunFigures) -> None:
    settled = replace(derivation, inputs={**derivation.inputs, **built.inputs})
    assert settled.is_settled, f"the build of {settled.stage} did not say what its inputs were: {settled.inputs}"
    manifest = Manifest(
        derivation=settled,
        contents=built.contents,
        content_digest=built.contents.digest,
        result=built.result,
        recipe=built.recipe,
        run=run,
    )
    write_bytes(partial / MANIFEST, dump_manifest(manifest))


def _reveal(partial: Path, destination: Destination) -> Artifact:
    """Give a sealed directory its name, unless the same was made from a copy of the inputs meanwhile."""
    derivation = open_manifest(partial).derivation
    out = destination.path_for(derivation)
    if found := _finished(out, derivation):
        shutil.rmtree(partial)
        return found
    (partial / JOURNAL).unlink(missing_ok=True)
    if (partial / WORK_DIR).exists():
        shutil.rmtree(partial / WORK_DIR)
    partial.rename(out)
    (out / _DERIVATION).unlink(missing_ok=True)
    sync_directory(out.parent)
    return Artifact(path=out, manifest=open_manifest(out))


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
