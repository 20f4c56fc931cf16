"""padded -> unpadded: the checkpoint that was padded, bit for bit, by the padding map in the manifest."""

from dataclasses import replace
from pathlib import Path

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.manifest import Contents, Derivation, Manifest, open_manifest
from qwen_pipeline.checkpoint.store.derive import Built, derive
from qwen_pipeline.checkpoint.store.destinations import Artifact, Destination
from qwen_pipeline.checkpoint.store.verify import require_intact
from qwen_pipeline.checkpoint.writer import write_checkpoint
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.qwen.geometry import load_plan
from qwen_pipeline.reports import CheckReport, CheckSpec, dump_reports
from qwen_pipeline.transforms.padding.pad import unpad as unpad_checkpoint

STAGE = "unpadded"
CODE_VERSION = "1"
CHECKS = (
    CheckSpec(
        name="is_what_was_padded",
        description="Tensors, config and the files beside them have the digest of the checkpoint that was padded.",
    ),
)


def unpad(*, source: Path, destination: Destination, observe: Observe = unobserved) -> Artifact:
    """Undo the stage pad.

    Raises:
        InputRefused: The directory is not one that pad wrote.
        CheckpointRefused: It was changed since.
    """
    padded, manifest = open_checkpoint(source), open_manifest(source)
    live = _live(padded, manifest, source)

    def build(partial: Path) -> Built:
        require_intact(source)
        contents = write_checkpoint(live, partial, task="unpad", observe=observe)
        return Built(contents=contents, result={"checks": dump_reports([_identity_report(contents, manifest)])})

    derivation = Derivation(
        stage=STAGE,
        inputs={"padded": manifest.content_digest},
        spec={name: manifest.result[name] for name in ("padding", "live_config")},
        code_version=CODE_VERSION,
    )
    return derive(derivation, destination, build)


def _live(padded: Checkpoint, manifest: Manifest, source: Path) -> Checkpoint:
    if "live_config" not in manifest.result:
        raise InputRefused(
            f"{source} is a {manifest.derivation.stage} checkpoint whose manifest does not say how to undo padding.",
            remedy="Name a directory that this version's stage pad wrote.",
        )
    live = unpad_checkpoint(padded, load_plan(manifest.result["padding"]))
    config = manifest.result["live_config"]
    return replace(live, config_bytes=config.encode()) if config else live


def _identity_report(contents: Contents, manifest: Manifest) -> CheckReport:
    expected = manifest.derivation.inputs.get("source")
    return CheckReport(
        name=CHECKS[0].name,
        passed=expected in (None, contents.digest),
        measured=contents.digest,
        limit=expected,
        detail="This is the checkpoint that was padded, bit for bit."
        if expected
        else "It was merged and padded in one pass, so there is no digest to compare with.",
    )
