"""Running a stage once for each derivation: its output is found, continued or built, and never overwritten.

A directory gets its final name only when it is complete. It is built as ``<name>.partial`` under a lock and synced; its
manifest is written last, and then it is renamed. An attempt that was killed at any moment is continued by the next one,
since the files it resumes from are kept until the manifest is written.
"""

import errno
import json
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.files import open_locked, remove_scratch, sync_directory, write_bytes
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
from qwen_pipeline.checkpoint.store import log
from qwen_pipeline.checkpoint.store.destinations import PARTIAL, Artifact, Destination, as_destination
from qwen_pipeline.errors import (
    CheckFailed,
    CheckpointRefused,
    DestinationLocked,
    DestinationRefused,
    EnvironmentFault,
    machine_fault,
)

WORK_DIR = ".workshop"
"""The folder of the partial directory for a build's own resume state; removed before the final rename."""
_DERIVATION = ".derivation"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """The outcome of a build, for the manifest.

    Attributes:
        contents: Digests of the tensors and files that were written.
        result: The stage's findings, as JSON values.
        worker_peak_bytes: Peak resident memory of its worker processes.
        inputs: Role -> digest of each input that was :data:`UNREAD` before the build.
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
    fingerprints: Mapping[str, str] | None = None,
    attest: Callable[[Path], object] | None = None,
) -> Artifact:
    """Return the finished directory of a derivation; run ``build`` only if there is none.

    ``build(partial)`` writes the output's files into ``partial`` and returns their digests. It runs under a lock, with
    no other build of the same output. ``partial`` may hold the files of an interrupted build of the same derivation,
    which it may continue from; files of any other are removed first. When it returns, the manifest is written and
    ``partial`` becomes the finished directory in one rename, so that no reader sees a partial output.

    Args:
        derivation: The stage, its inputs by digest, its settings and its code version. An input may be
            :data:`UNREAD`: the build then computes its digest and returns it in :attr:`Built.inputs`.
        destination: The place for the directory, or its path.
        build: Writes the files.
        fingerprints: Role -> :func:`fingerprint` of each input that may be unread. They identify an interrupted build,
            so that it is continued whether or not the input's digest has become known in the meantime.
        attest: Called with the finished directory, new or found, before the destination records it. It may add files
            that no manifest lists.

    Returns:
        The directory and its manifest, with ``reused=True`` if nothing had to be built.

    Raises:
        DestinationRefused: The directory holds another output, or files that this pipeline did not write.
        DestinationLocked: Another process is building the same output.
        CheckpointRefused: A file of the finished directory is missing or does not have the size in its manifest.
        EnvironmentFault: The disk is full.
    """
    destination = as_destination(destination)
    artifact = find(derivation, destination)
    if not artifact:
        attempt = replace(derivation, inputs={**derivation.inputs, **(fingerprints or {})})
        artifact = _build_under_lock(attempt, derivation, destination, build)
    if attest:
        attest(artifact.path)
    destination.on_finished(artifact.path, made=not artifact.reused)
    return artifact


def store_recipe(root: Path, build: Callable[[Path], Contents]) -> Artifact:
    """Write the weights of a recipe (:class:`Manifest`) into its directory, and then replace the manifest in one step.

    Raises:
        CheckFailed: The weights that were written are not those that the manifest states.
        DestinationLocked: Another process is writing the directory.
    """
    with _lock(root), _disk_faults(root):
        manifest = open_manifest(root)
        with measured() as figures:
            contents = build(root)
        if contents.digest != manifest.content_digest:
            raise CheckFailed(
                f"The weights of {root} have the digest {contents.digest}, expected {manifest.content_digest}.",
                remedy="Store them where the recipe was made: another processor or torch may round differently.",
            )
        stored = replace(manifest, contents=contents, recipe=None, run=figures())
        write_bytes(root / MANIFEST, dump_manifest(stored))
        (root / JOURNAL).unlink(missing_ok=True)
        if store := log.logged_store(root):
            log.record(store, root, "materialized")
        return Artifact(path=root, manifest=stored)


def find(derivation: Derivation, destination: Destination) -> Artifact | None:
    """Return the finished directory of a derivation; None if there is none, or an input is still unread."""
    return _finished(destination.path_for(derivation), derivation) if derivation.is_complete else None


def _finished(out: Path, derivation: Derivation) -> Artifact | None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise DestinationRefused(
            f"{out} is not empty and was not made by this pipeline.",
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
                f"{out / path} is missing or does not have the {file.bytes:,} bytes that the manifest states.",
                remedy="Delete the directory and run its stage again; the result is the same.",
            )
    return Artifact(path=out, manifest=manifest, reused=True)


def _build_under_lock(
    attempt: Derivation, derivation: Derivation, destination: Destination, build: Callable[[Path], Built]
) -> Artifact:
    out = destination.path_for(attempt)
    partial = out.with_name(out.name + PARTIAL)
    with _lock(out), _disk_faults(partial):
        if found := find(derivation, destination):
            return found
        _prepare(partial, attempt)
        if not (partial / MANIFEST).is_file():
            with measured() as figures:
                built = build(partial)
            _seal(partial, derivation, built, figures(worker_peak_bytes=built.worker_peak_bytes))
        return _reveal(partial, destination)


def _prepare(partial: Path, attempt: Derivation) -> None:
    """Keep the files of an interrupted attempt at the same derivation; remove those of any other."""
    label, expected = partial / _DERIVATION, f"{FORMAT} {attempt.key}"
    if partial.exists() and not (label.is_file() and label.read_text() == expected):
        shutil.rmtree(partial)
    partial.mkdir(exist_ok=True)
    remove_scratch(partial)
    write_bytes(label, expected.encode())


def _seal(partial: Path, derivation: Derivation, built: Built, run: RunFigures) -> None:
    complete = replace(derivation, inputs={**derivation.inputs, **built.inputs})
    assert complete.is_complete, f"the build of {complete.stage} returned no digest for an input: {complete.inputs}"
    manifest = Manifest(
        derivation=complete,
        contents=built.contents,
        content_digest=built.contents.digest,
        result=built.result,
        recipe=built.recipe,
        run=run,
    )
    write_bytes(partial / MANIFEST, dump_manifest(manifest))


def _reveal(partial: Path, destination: Destination) -> Artifact:
    """Rename a directory with a manifest, unless the same output was made from a copy of the inputs meanwhile."""
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
    with _disk_faults(out):
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            lock = open_locked(out.with_name(out.name + ".lock"))
        except BlockingIOError as error:
            raise DestinationLocked(
                f"Another process is writing {out}.", remedy="Wait for it to end, or end it, then run again."
            ) from error
        except OSError as error:
            if error.errno in _FULL:
                raise
            raise DestinationRefused(
                f"{out} cannot be created: {error.strerror} ({error.filename}).",
                remedy="Choose a place below a directory in which files can be created.",
            ) from error
    with lock:
        yield


@contextmanager
def _disk_faults(partial: Path) -> Generator[None, None, None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise machine_fault(error, place=partial) from error
        raise EnvironmentFault(
            f"The disk of {partial} is full ({error.strerror}).",
            remedy="Free space and run again: finished shards are kept.",
        ) from error


def _difference(found: Derivation, expected: Derivation) -> str:
    if found.stage != expected.stage:
        return f"a {found.stage} checkpoint, expected a {expected.stage} one"
    for part, actual, requested in (
        ("other inputs", found.inputs, expected.inputs),
        ("another spec", found.spec, expected.spec),
        ("another code version", found.code_version, expected.code_version),
    ):
        if actual != requested:
            return f"a {found.stage} checkpoint of {part}: {json.dumps(actual)}, expected {json.dumps(requested)}"
    return "another derivation"
