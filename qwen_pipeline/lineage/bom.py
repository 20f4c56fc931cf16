"""CycloneDX 1.6 ML-BOM of a release: model card, pedigree, datasets, measurements and files.

https://cyclonedx.org/docs/1.6/json/. The same release gives the same BOM: its serial number is made of the release's
derivation key, and its time is that of the publication.
"""

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwen_pipeline.checkpoint.store.origin import FIELDS
from qwen_pipeline.lineage.verification.records import Record, RecordedStep

SPEC_VERSION = "1.6"
_TEXTS = {"text": "held-out text", "calibration": "calibration tokens"}
"""Roles of inputs that are data sets -> their use."""


def ml_bom(
    release: Record, steps: Sequence[RecordedStep], report: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the BOM of a release.

    Args:
        release: Its manifest.
        steps: The stages before it, from the first.
        report: Its validation report.
        config: The ``config.json`` of the quantized model.
    """
    spec = release.step.spec
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": str(spec.get("fine_tune")),
        "version": release.step.key[:16],
        "properties": [_content(release.step.content_digest)],
        "modelCard": _model_card(steps, report, config),
        "pedigree": {
            "ancestors": list(_ancestors(release, steps)),
            "notes": json.dumps({step.stage: step.spec for step in steps}, sort_keys=True, ensure_ascii=False),
        },
        "components": [
            {"type": "file", "bom-ref": f"file:{path}", "name": path, "hashes": [{"alg": "SHA-256", "content": digest}]}
            for path, digest in sorted(release.sha256().items())
        ],
    }
    environment: Mapping[str, Any] = release.run.get("environment") or {}
    tools = [
        {"type": "application", "name": str(name), "version": str(version)}
        for name, version in environment.items()
        if name not in FIELDS
    ]
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC_VERSION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, release.step.key)}",
        "version": 1,
        "metadata": {"timestamp": str(release.run.get("started")), "tools": {"components": tools}, "component": model},
        "dependencies": [{"ref": "model", "dependsOn": []}],
    }


def _model_card(steps: Sequence[RecordedStep], report: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    checks: list[Mapping[str, Any]] = list(report.get("checks", ()))
    skipped = [f"{check['name']} was skipped: {check['detail']}" for check in checks if check.get("skipped")]
    return {
        "modelParameters": {
            "architectureFamily": str(config.get("model_type")),
            "modelArchitecture": str((config.get("architectures") or ["unknown"])[0]),
            "datasets": list(_datasets(steps)),
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": list(_metrics(report, checks))},
        "considerations": {
            "technicalLimitations": [
                "Quantized: its answers differ from the fine-tune's within the measured divergence.",
                *skipped,
            ]
        },
    }


def _metrics(report: Mapping[str, Any], checks: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield every figure of every model, and the measured value of every check with its limit."""
    for model, figures in dict(report.get("findings", {}).get("models", {})).items():
        for name, value in figures.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield {"type": name, "value": repr(value), "slice": model}
    for check in checks:
        if check.get("measured") is not None:
            limit = "" if check.get("limit") is None else f"; limit {check['limit']}"
            yield {"type": str(check["name"]), "value": f"{check['measured']}", "slice": f"{_outcome(check)}{limit}"}


def _outcome(check: Mapping[str, Any]) -> str:
    return "passed" if check.get("passed") else "skipped" if check.get("skipped") else "not passed"


def _datasets(steps: Sequence[RecordedStep]) -> Iterator[dict[str, Any]]:
    for step in steps:
        for role, use in _TEXTS.items():
            if digest := step.inputs.get(role):
                yield {
                    "type": "dataset",
                    "name": f"{role} of {step.stage}",
                    "classification": use,
                    "contents": {"properties": [_content(digest)]},
                }


def _ancestors(release: Record, steps: Sequence[RecordedStep]) -> Iterator[dict[str, Any]]:
    """Yield the base, each fine-tune and every intermediate checkpoint."""
    made = {step.content_digest: step.stage for step in steps}
    for step in steps:
        for role, digest in step.made_from.items():
            if digest not in made and role not in _TEXTS and digest.startswith("sha256:"):
                name = str(release.step.spec.get("base_model")) if role == "base" else f"{role} of {step.stage}"
                made[digest] = name
                yield _ancestor(f"{role}:{step.stage}", name, digest)
    for step in steps:
        if step.stage not in ("validated", "calibration"):
            yield _ancestor(f"stage:{step.stage}:{step.key[:16]}", step.stage, step.content_digest)


def _ancestor(ref: str, name: str, digest: str) -> dict[str, Any]:
    return {"type": "machine-learning-model", "bom-ref": ref, "name": name, "properties": [_content(digest)]}


def _content(digest: str) -> dict[str, str]:
    return {"name": "qwen-pipeline:content-digest", "value": digest}
