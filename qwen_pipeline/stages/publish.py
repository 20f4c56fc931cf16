"""``quantized + validated -> published``: a directory ready to upload, made only of files that passed validation."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qwen_pipeline.checkpoint.digest import digest_file, digest_files, digest_shard, hash_checkpoint
from qwen_pipeline.checkpoint.files import copy_file
from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.manifest import Contents, Derivation, FileDigest, Manifest, open_manifest
from qwen_pipeline.checkpoint.store.canonical import LOGS
from qwen_pipeline.checkpoint.store.derive import Built, derive
from qwen_pipeline.checkpoint.store.destinations import Artifact, Destination
from qwen_pipeline.checkpoint.store.lineage import Step, dump_step, step_of
from qwen_pipeline.errors import CheckFailed, CheckpointRefused, listed
from qwen_pipeline.evaluation.checks import verdict
from qwen_pipeline.evaluation.head_checks import concerning
from qwen_pipeline.evaluation.report.load import REPORT_JSON, ValidationReport, load_validation
from qwen_pipeline.evaluation.report.markdown import REPORT, quality_table
from qwen_pipeline.evaluation.report.model_card import ModelCard, public_name
from qwen_pipeline.lineage.released_files import OF_CHECKPOINT, OF_VALIDATION, require_releasable
from qwen_pipeline.lineage.sign import load_key, sign_release
from qwen_pipeline.progress import Observe, Progress, unobserved
from qwen_pipeline.reports import CheckSpec, dump_reports

STAGE = "published"
CODE_VERSION = "3"
COPIES = 4
"""Files that are copied and read back at a time."""
README, PROVENANCE, VALIDATION = "README.md", "provenance.json", "validation"

PASSED = CheckSpec(
    name="validation_passed",
    description="A validation of exactly these bytes passed every blocking check; only optional ones were skipped.",
)
INTACT = CheckSpec(name="release_intact", description="Every file of the release has the SHA-256 that was validated.")
CHECKS = (PASSED, INTACT)


def publish(
    *,
    quantized: Path,
    validated: Path,
    destination: Destination | Path,
    base_model: str,
    fine_tune: str,
    recipe: str | None = None,
    signing_key: Path | None = None,
    signing_certificate: Path | None = None,
    observe: Observe = unobserved,
) -> Artifact:
    """Make a release of a quantized checkpoint: its files, a model card, the validation report, and the provenance.

    A check that was skipped proves nothing: the card names it, and it must be one that configuration may leave out.

    Args:
        quantized: The finished quantized checkpoint.
        validated: The finished validation of it.
        destination: Where the release goes.
        base_model: Hub id of the base, or its directory, for the card.
        fine_tune: The name of the release.
        recipe: The recipe of the settings that made it, for manifest and card; None for the default one.
        signing_key: A P-256 private key in PEM. It also signs a release that was made before, if it has not yet.
        signing_certificate: PEM file of the certificate that an authority made for the key, and intermediate ones.
        observe: Called with the bytes copied.

    Raises:
        CheckFailed: The validation is of another checkpoint, a blocking check failed, or a required check was skipped.
        CheckpointRefused: The validation is damaged, a file is not the one that was validated, or is of a kind that no
            release holds.
        InputRefused: The signing key cannot be read.
    """
    checkpoint, validation = open_manifest(quantized), open_manifest(validated)
    report = _require_passed(checkpoint, validation, validated)
    key = load_key(signing_key, signing_certificate) if signing_key else None
    derivation = Derivation(
        stage=STAGE,
        inputs={"quantized": checkpoint.content_digest, "validated": validation.content_digest},
        spec={"base_model": public_name(base_model), "fine_tune": fine_tune, **_recipe_spec(recipe)},
        code_version=CODE_VERSION,
    )

    def build(partial: Path) -> Built:
        released = _copy_files(checkpoint, quantized, partial, OF_CHECKPOINT, observe)
        report_files = _copy_files(validation, validated, partial / VALIDATION, OF_VALIDATION, observe)
        released |= {f"{VALIDATION}/{path}": file for path, file in report_files.items()}
        steps = [step_of(checkpoint), step_of(validation)]
        card = _card(partial, report, steps, base_model=base_model, fine_tune=fine_tune, recipe=recipe)
        (partial / README).write_text(card.render())
        (partial / PROVENANCE).write_text(_provenance(card))
        written = digest_files({name: partial / name for name in (README, PROVENANCE)})
        checks = [
            PASSED.report(passed=True, detail=verdict(report.checks).capitalize() + "."),
            INTACT.report(passed=True, measured=len(released), detail="Files read back and compared."),
        ]
        contents = Contents(tensors=checkpoint.contents.tensors, files=released | written)
        return Built(contents=contents, result={"checks": dump_reports(checks)})

    return derive(derivation, destination, build, attest=(lambda root: sign_release(root, key)) if key else None)


def _require_passed(checkpoint: Manifest, validation: Manifest, validated: Path) -> ValidationReport:
    remedy = "Validate this checkpoint: qwen-pipeline validate."
    if REPORT_JSON not in validation.contents.files:
        raise CheckFailed(
            f"{validated} holds a {validation.derivation.stage} output, not a validation of"
            f" {checkpoint.content_digest}.",
            remedy=remedy,
        )
    report = load_validation(validated, validation)
    if report.candidate != checkpoint.content_digest:
        raise CheckFailed(
            f"{validated} is a validation of {report.candidate}, not of {checkpoint.content_digest}.", remedy=remedy
        )
    if obstacles := report.obstacles:
        raise CheckFailed(
            f"Validation failed, so {checkpoint.content_digest} is not published: {listed(obstacles)}",
            remedy=f"Read {validated / REPORT}, correct the cause and run the stages again.",
        )
    return report


def _copy_files(
    manifest: Manifest, root: Path, out: Path, allowed: Sequence[str], observe: Observe
) -> dict[str, FileDigest]:
    """Copy the files of a finished directory without its logs; read each copy back and compare it with the manifest.

    Every file of a release has a SHA-256, shards too, so that other tools can verify it.
    """
    files = {path: file for path, file in manifest.contents.files.items() if not path.startswith(LOGS)}
    require_releasable(root, files, allowed)

    def copied_file(path: str) -> FileDigest:
        if not (root / path).is_file():
            raise _other_file(root / path)
        copy_file(root / path, out / path)
        released = digest_file(out / path)
        if files[path] != (released if isinstance(files[path], FileDigest) else digest_shard(out / path)):
            raise _other_file(root / path)
        return released

    released: dict[str, FileDigest] = {}
    done, total = 0, sum(file.bytes for file in files.values())
    with ThreadPoolExecutor(COPIES) as pool:
        for path, digest in zip(files, pool.map(copied_file, files), strict=True):
            released[path] = digest
            done += digest.bytes
            observe(Progress(task=f"publish {manifest.derivation.stage}", done=done, total=total, unit="bytes"))
    if manifest.contents.tensors:
        copied = open_checkpoint(out)
        tensors = hash_checkpoint(copied, out, observe=observe).tensors
        for name in tensors:
            if tensors[name] != manifest.contents.tensors.get(name):
                raise _other_file(root / copied.shards[name])
    return released


def _other_file(path: Path) -> CheckpointRefused:
    return CheckpointRefused(
        f"{path} is {'not the file that was validated' if path.is_file() else 'missing'}.",
        remedy=f"Delete {path.parent} and run its stage again; the result is the same.",
    )


def _card(
    release: Path,
    report: ValidationReport,
    steps: Sequence[Step],
    *,
    base_model: str,
    fine_tune: str,
    recipe: str | None,
) -> ModelCard:
    """Describe a release; ``steps`` are those after the validation's reference."""
    return ModelCard(
        name=fine_tune,
        recipe=recipe,
        base_model=base_model,
        config=open_checkpoint(release).config,
        padding=report.padding,
        split=report.findings.structure.padding.twins > 0,
        quality=quality_table(report.findings.models, report.findings.nbytes),
        verdict=verdict(report.checks),
        skipped=[f"`{check.name}`: {check.detail}" for check in concerning(report.checks) if check.skipped],
        steps=[*report.lineage, *steps],
        task=report.findings.task,
    )


def _recipe_spec(recipe: str | None) -> dict[str, str]:
    """Return the field that names the recipe; none for the default one, whose releases keep their digests."""
    return {"recipe": recipe} if recipe else {}


def _provenance(card: ModelCard) -> str:
    provenance = {
        "format": "qwen-pipeline/provenance/1",
        "fine_tune": card.name,
        **_recipe_spec(card.recipe),
        "base_model": card.base_name,
        "steps": [dump_step(step) for step in card.steps],
    }
    return json.dumps(provenance, indent=2, ensure_ascii=False) + "\n"
