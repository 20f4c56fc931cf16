"""``padded -> unpadded``: the checkpoint before padding, bit for bit, restored by the padding map in the manifest."""

from dataclasses import replace
from pathlib import Path

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.checkpoint.manifest import Contents, Derivation, Manifest, open_manifest
from qwen_pipeline.checkpoint.store.derive import Built, derive
from qwen_pipeline.checkpoint.store.destinations import Artifact, Destination
from qwen_pipeline.checkpoint.store.verify import require_intact
from qwen_pipeline.checkpoint.writer import write_checkpoint
from qwen_pipeline.errors import InputRefused, listed
from qwen_pipeline.models.open import open_model
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.qwen.geometry import load_plan
from qwen_pipeline.reports import CheckReport, CheckSpec, dump_reports
from qwen_pipeline.transforms.codes.base_weights import AS_STORED, base_weights
from qwen_pipeline.transforms.padding.pad import unpad as unpad_checkpoint

STAGE = "unpadded"
CODE_VERSION = "1"
IS_WHAT_WAS_PADDED = CheckSpec(
    name="is_what_was_padded",
    description="Tensors, config and other files have the digest of the checkpoint that was padded.",
)
CHECKS = (IS_WHAT_WAS_PADDED,)


def unpad(*, source: Path, destination: Destination | Path, observe: Observe = unobserved) -> Artifact:
    """Undo the stage ``pad``.

    Args:
        source: A padded checkpoint.
        destination: The output directory.
        observe: Called with the progress.

    Raises:
        InputRefused: The manifest has no padding map.
        CheckpointRefused: The source has no manifest, or has changed since it was written.
    """
    padded, manifest = open_model(source), open_manifest(source)
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
            f"{source} is a {manifest.derivation.stage} checkpoint whose manifest has no data for unpadding.",
            remedy="Pass a directory that the stage pad of this version wrote.",
        )
    live = unpad_checkpoint(padded, load_plan(manifest.result["padding"]))
    config = manifest.result["live_config"]
    return replace(live, config_bytes=config.encode()) if config else live


def _identity_report(contents: Contents, manifest: Manifest) -> CheckReport:
    expected = manifest.derivation.inputs.get("source")
    if expected is None:
        return IS_WHAT_WAS_PADDED.skipped(
            "The padded checkpoint was made by merging into a padded base, so there is no digest to compare with."
        )
    if left_behind := manifest.result.get("left_behind"):
        return IS_WHAT_WAS_PADDED.skipped(f"Padding left buffers behind that are no weights: {listed(left_behind)}.")
    if split := manifest.result.get("split"):
        return IS_WHAT_WAS_PADDED.skipped(f"Padding split fused matrices: {listed(split)}.")
    if base_weights(manifest.derivation.spec) != AS_STORED:
        return IS_WHAT_WAS_PADDED.skipped(
            "What was padded is the full precision of a quantized checkpoint, which was never stored."
        )
    is_same = contents.digest == expected
    return IS_WHAT_WAS_PADDED.report(
        passed=is_same,
        measured=contents.digest,
        limit=expected,
        detail="This is the checkpoint that was padded, bit for bit."
        if is_same
        else "This is not the checkpoint that was padded. Report this as a defect.",
    )
