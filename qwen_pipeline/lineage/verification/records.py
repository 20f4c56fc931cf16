"""Manifests read without pydantic: the fields that verification needs, and the steps that a release records."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from qwen_pipeline.checkpoint.files import load_json, parse_json
from qwen_pipeline.checkpoint.store.canonical import BEFORE, MANIFEST_FILE, canonical_sha256, content_digest
from qwen_pipeline.errors import CheckpointRefused

FORMAT = "qwen-pipeline/manifest/4"
REPORT, STEPS = "validation/report.json", "provenance.json"
"""The validation's report and the recorded steps in a release."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedStep:
    """One stage as a manifest or a release records it.

    Attributes:
        inputs: Role -> content digest.
        key: The derivation key that is recorded with it.
    """

    stage: str
    content_digest: str
    inputs: Mapping[str, str]
    spec: Mapping[str, Any]
    code_version: str
    key: str

    @property
    def made_from(self) -> Mapping[str, str]:
        """The inputs without the version that a validation compares with."""
        return {role: digest for role, digest in self.inputs.items() if role != BEFORE}

    @property
    def compared_with(self) -> Mapping[str, str]:
        """The version that a validation compares with, if it has one."""
        return {role: digest for role, digest in self.inputs.items() if role == BEFORE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The manifest of a finished directory.

    Attributes:
        step: Stage, inputs, settings and digest.
        tensors: Name -> dtype, shape and ``tree_blake3``.
        files: Relative path -> ``bytes``, and ``sha256`` or ``header_sha256``.
        recipe: Role -> path of each input that the tensors are computed from; empty if they are in this directory.
    """

    root: Path
    step: RecordedStep
    tensors: Mapping[str, tuple[str, list[int], str]]
    files: Mapping[str, Mapping[str, Any]]
    recipe: Mapping[str, str]
    result: Mapping[str, Any] = field(default_factory=dict[str, Any])
    run: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def stored(self) -> bool:
        """True if the tensors are in this directory."""
        return not self.recipe

    @property
    def nbytes(self) -> int:
        """Size of its files."""
        return sum(file["bytes"] for file in self.files.values())

    def sha256(self, below: str = "") -> dict[str, str]:
        """Return the SHA-256 of each file below a folder (``validation/``), by its path from there."""
        return {
            path.removeprefix(below): str(file["sha256"])
            for path, file in self.files.items()
            if path.startswith(below) and "sha256" in file
        }


def read_record(root: Path) -> Record:
    """Read a directory's manifest and compare the digests in it with each other.

    Raises:
        CheckpointRefused: There is no manifest of this format, or its fields or digests do not agree.
    """
    path = root / MANIFEST_FILE
    if not path.is_file():
        raise CheckpointRefused(
            f"{root} has no {MANIFEST_FILE}.", remedy="Pass a directory that a stage of this pipeline finished."
        )
    manifest = load_json(path)
    if manifest.get("format") != FORMAT:
        raise _damaged(path, f"its format is {manifest.get('format')!r}, expected {FORMAT!r}")
    try:
        record = _record(root, manifest)
        digest = content_digest(record.tensors, record.sha256())
        _ = record.step.key
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, f"a field is missing or has another type ({error!r})") from error
    if digest != record.step.content_digest:
        raise _damaged(path, f"its content_digest is {record.step.content_digest}, its entries give {digest}")
    return record


def read_steps(root: Path) -> list[RecordedStep]:
    """Read the steps that a release records in ``provenance.json``.

    Raises:
        CheckpointRefused: The file is missing or damaged.
    """
    path = root / STEPS
    provenance = load_json(path)
    try:
        return [step_from_json(step) for step in provenance["steps"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, f"a field is missing or has another type ({error!r})") from error


def step_from_json(step: Mapping[str, Any]) -> RecordedStep:
    """Return a step from the JSON values of :class:`~qwen_pipeline.checkpoint.store.lineage.Step`."""
    return RecordedStep(
        stage=str(step["stage"]),
        content_digest=str(step["content_digest"]),
        inputs={str(role): str(digest) for role, digest in step["inputs"].items()},
        spec=dict(step["spec"]),
        code_version=str(step["code_version"]),
        key=str(step["key"]),
    )


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """Parse a JSON object that is part of a release.

    Raises:
        CheckpointRefused: It is not one.
    """
    try:
        value = parse_json(data)
    except ValueError as error:
        raise CheckpointRefused(f"{name} is not valid JSON: {error}.", remedy="Fetch the release again.") from error
    if not isinstance(value, dict):
        raise CheckpointRefused(f"{name} is not a JSON object.", remedy="Fetch the release again.")
    return value


def _record(root: Path, manifest: Mapping[str, Any]) -> Record:
    made, contents = manifest["derivation"], manifest["contents"]
    derivation = [made["stage"], dict(made["inputs"]), dict(made["spec"]), made["code_version"]]
    step = step_from_json({**made, "content_digest": manifest["content_digest"], "key": canonical_sha256(derivation)})
    files = {str(path): dict(file) for path, file in contents["files"].items()}
    if outside := [path for path in files if not _is_below(path)]:
        raise ValueError(f"{outside[0]!r} is not a path below its directory")
    if sizeless := [path for path, file in files.items() if type(file["bytes"]) is not int or file["bytes"] < 0]:
        raise ValueError(f"{sizeless[0]!r} has no number of bytes")
    tensors = {
        str(name): (str(tensor["dtype"]), list(tensor["shape"]), str(tensor["tree_blake3"]))
        for name, tensor in contents["tensors"].items()
    }
    return Record(
        root=root,
        step=step,
        tensors=tensors,
        files=files,
        recipe={str(role): str(path) for role, path in (manifest.get("recipe") or {}).items()},
        result=dict(manifest.get("result") or {}),
        run=dict(manifest.get("run") or {}),
    )


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _damaged(path: Path, why: str) -> CheckpointRefused:
    return CheckpointRefused(f"{path} is damaged: {why}.", remedy="Fetch or make the directory again.")
