"""The lineage of a checkpoint: the output of each stage and its inputs, by digest."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, cast

from pydantic import TypeAdapter

from qwen_pipeline.checkpoint.manifest import Manifest, find_manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One stage in the lineage of a checkpoint.

    Attributes:
        inputs: Role -> content digest.
        spec: The stage's settings. Absolute paths in it are cut to their last part, since a release is public.
        key: The derivation key; its first digits name the directory in the store.
    """

    stage: str
    content_digest: str
    inputs: Mapping[str, str]
    spec: Mapping[str, Any]
    code_version: str
    key: str


_STEP = TypeAdapter(Step)


def step_of(manifest: Manifest) -> Step:
    """Return the step that wrote a manifest."""
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
    """Return the steps that made these directories; those that this pipeline did not make are skipped."""
    return [step_of(manifest) for manifest in map(find_manifest, roots) if manifest]


def dump_step(step: Step) -> dict[str, Any]:
    return _STEP.dump_python(step, mode="json")


def _without_directories(value: Any) -> Any:
    if isinstance(value, str) and PurePath(value).is_absolute():
        return PurePath(value).name
    if isinstance(value, dict):
        return {key: _without_directories(item) for key, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_without_directories(item) for item in cast("list[Any]", value)]
    return value
