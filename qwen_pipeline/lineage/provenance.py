"""SLSA provenance v1 of a release, as an in-toto Statement: https://slsa.dev/spec/v1.0/provenance.

Content digests are not the SHA-256 of a file, so they have a name of their own in every digest set.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.files import load_json
from qwen_pipeline.checkpoint.store.canonical import PROVENANCE
from qwen_pipeline.checkpoint.store.origin import FIELDS
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.lineage.verification.model_signature import STATEMENT
from qwen_pipeline.lineage.verification.records import Record, RecordedStep

PREDICATE = "https://slsa.dev/provenance/v1"
SITE = "https://qwen-pipeline.dev"
"""The name space of this pipeline's build types; a URI that identifies, and leads nowhere."""
LOG_HEAD = "store_log"
CONTENT_DIGEST = "qwenPipelineContent"
"""The algorithm of content digests in digest sets (docs/format.md)."""
_CODE = {"commit": "gitCommit", "code": "qwenPipelineCode", "packages": "qwenPipelinePackages"}
"""Field of a manifest's environment -> algorithm of its digest."""


def provenance(release: Record, steps: Sequence[RecordedStep], log: tuple[int, str] | None = None) -> dict[str, Any]:
    """Return the Statement: the files of a release, all settings of its stages, and every input by digest.

    Args:
        release: The manifest of the release.
        steps: The stages before it, from the first.
        log: Number of lines of the store's log and digest of the last one; None if there is none.
    """
    run, sha256 = release.run, release.sha256()
    internal: dict[str, Any] = {step.stage: {"code_version": step.code_version} for step in steps}
    if log:
        internal[LOG_HEAD] = {"lines": log[0], "sha256": log[1]}
    given = dict(run.get("environment") or {})
    environment = {str(name): str(version) for name, version in given.items() if name not in FIELDS}
    started = str(run.get("started"))
    return {
        "_type": STATEMENT,
        "subject": [{"name": path, "digest": {"sha256": digest}} for path, digest in sorted(sha256.items())],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": f"{SITE}/release/v1",
                "externalParameters": {step.stage: step.spec for step in [*steps, release.step]},
                "internalParameters": internal,
                "resolvedDependencies": [*_dependencies([*steps, release.step]), *_code(given)],
            },
            "runDetails": {
                "builder": {"id": f"{SITE}/builder", "version": environment},
                "metadata": {
                    "invocationId": release.step.key,
                    "startedOn": started,
                    "finishedOn": _later(started, float(run.get("seconds") or 0)),
                },
                "byproducts": [
                    {"name": step.stage, "digest": {CONTENT_DIGEST: _hex(step.content_digest)}}
                    for step in [*steps, release.step]
                ],
            },
        },
    }


def signed_log_head(root: Path) -> tuple[int, str] | None:
    """Return the lines of the store's log and the digest of the last one that a release's provenance states.

    Its signature is verified elsewhere. None if there is no provenance, or it states none.
    """
    try:
        envelope = load_json(root / PROVENANCE)
        statement = json.loads(base64.b64decode(envelope["payload"]))
        stated = statement["predicate"]["buildDefinition"]["internalParameters"][LOG_HEAD]
        return int(stated["lines"]), str(stated["sha256"])
    except (CheckpointRefused, KeyError, TypeError, ValueError):
        return None


def _dependencies(steps: Sequence[RecordedStep]) -> list[dict[str, Any]]:
    """Return every input that no stage made: base, fine-tune, texts."""
    made = {step.content_digest for step in steps}
    inputs: dict[str, str] = {}
    for step in steps:
        for role, digest in step.inputs.items():
            inputs.setdefault(digest, f"{role} of {step.stage}")
    return [
        {"name": name, "digest": {CONTENT_DIGEST: _hex(digest)}}
        for digest, name in inputs.items()
        if digest not in made and digest.startswith("sha256:")
    ]


def _code(environment: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the code and the packages that published a release, as its manifest states them."""
    return [
        {"name": name, "digest": {algorithm: _hex(str(environment[name]))}}
        for name, algorithm in _CODE.items()
        if name in environment
    ]


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")


def _later(started: str, seconds: float) -> str:
    return (datetime.fromisoformat(started) + timedelta(seconds=seconds)).isoformat()
