"""Validations that were edited by hand, with or without the digests that cover them."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from qwen_pipeline.checkpoint.manifest import Contents, FileDigest, dump_manifest, open_manifest

Change = Mapping[str, Any]
"""Field of the result -> its new value; ``checks`` may map the name of a check to the fields to replace in its report.

Of a check, ``{"remove": True}`` removes the report and ``{"twice": True}`` repeats it.
"""
ALL_FILES = ("manifest.json", "report.json", "digests")


def rewritten(validated: Path, out: Path, change: Change, *, files: Sequence[str] = ALL_FILES) -> Path:
    """Copy a validation with a changed result in the named files; without ``digests``, they are left as they were."""
    shutil.copytree(validated, out)
    manifest = open_manifest(out)
    result = _changed(manifest.result, change)
    report = (json.dumps(result, indent=2) + "\n").encode()
    stated = result if "manifest.json" in files else manifest.result
    if "digests" in files:
        seal(out, report, stated)
        return out
    if "report.json" in files:
        (out / "report.json").write_bytes(report)
    (out / "manifest.json").write_bytes(dump_manifest(replace(manifest, result=stated)))
    return out


def seal(root: Path, report: bytes, result: Mapping[str, Any]) -> None:
    """Replace a report and the manifest's result, with every digest that covers them."""
    (root / "report.json").write_bytes(report)
    manifest = open_manifest(root)
    digest = FileDigest(bytes=len(report), sha256=hashlib.sha256(report).hexdigest())
    contents = Contents(tensors=manifest.contents.tensors, files={**manifest.contents.files, "report.json": digest})
    inputs = {**manifest.derivation.inputs}
    if isinstance(candidate := result.get("candidate"), str):
        inputs["candidate"] = candidate
    derivation = replace(manifest.derivation, inputs=inputs)
    sealed = replace(manifest, contents=contents, content_digest=contents.digest, result=result, derivation=derivation)
    (root / "manifest.json").write_bytes(dump_manifest(sealed))


def _changed(result: Mapping[str, Any], change: Change) -> dict[str, Any]:
    checks = change.get("checks")
    if not isinstance(checks, Mapping):
        return {**result, **change}
    found: list[dict[str, Any]] = []
    for report in result["checks"]:
        fields = dict(cast("Mapping[str, dict[str, Any]]", checks).get(report["name"], {}))
        repeats = 0 if fields.pop("remove", False) else 2 if fields.pop("twice", False) else 1
        found += [{**report, **fields}] * repeats
    return {**result, **change, "checks": found}
