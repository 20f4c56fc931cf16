"""Where a checkpoint comes from: what each stage made, and from what, told by digests."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, cast

from pydantic import TypeAdapter

from qwen_pipeline.checkpoint.manifest import Manifest, find_manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one stage made.

    Attributes:
        inputs: Role -> content digest.
        spec: The stage's settings; of paths among them only the last part, since a release tells no one's directories.
        key: The derivation key, which the store's directory is named after.
    """

    stage: str
    content_digest: str
    inputs: Mapping[str, str]
    spec: Mapping[str, Any]
    code_version: str
    key: str


_STEP = TypeAdapter(Step)


def step_of(manifest: Manifest) -> Step:
    """Return the step that ended with a manifest."""
    derivation = manifest.derivation
    return Step(
        stage=derivation.stage,
        content_digest=manifest.content_digest,
        inputs=derivation.inputs,
        spec=_without_directories(dict(derivation.spec)),
        code_version=derivation.code_version,
        key=derivation.key,
    )


def steps_of(*roots: Path) -> list[Step]:
    """Return the steps that made these directories; one that this pipeline did not make has none."""
    return [step_of(manifest) for manifest in map(find_manifest, roots) if manifest]


def dump_step(step: Step) -> dict[str, Any]:
    return _STEP.dump_python(step, mode="json")


def load_step(value: Mapping[str, Any]) -> Step:
    return _STEP.validate_python(value)


def _without_directories(value: Any) -> Any:
    if isinstance(value, str) and PurePath(value).is_absolute():
        return PurePath(value).name
    if isinstance(value, dict):
        return {key: _without_directories(item) for key, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_without_directories(item) for item in cast("list[Any]", value)]
    return value
