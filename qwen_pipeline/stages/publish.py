"""``validated -> published``: the directory that a person would upload, made only from what passed."""

import json
from pathlib import Path

from qwen_pipeline.checkpoint.digest import contents_of, digest_file, digest_files, digest_shard
from qwen_pipeline.checkpoint.files import copy_file
from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.checkpoint.manifest import LOGS, Contents, Derivation, FileDigest, Manifest, open_manifest
from qwen_pipeline.checkpoint.store.derive import Built, derive
from qwen_pipeline.checkpoint.store.destinations import Artifact, Destination
from qwen_pipeline.checkpoint.store.lineage import dump_step, load_step, step_of
from qwen_pipeline.errors import CheckFailed, CheckpointRefused, listed
from qwen_pipeline.evaluation.checks import CHECKS as VALIDATION_CHECKS
from qwen_pipeline.evaluation.checks import verdict
from qwen_pipeline.evaluation.figures import load_figures
from qwen_pipeline.evaluation.report.markdown import quality_table
from qwen_pipeline.evaluation.report.model_card import ModelCard, Widened
from qwen_pipeline.progress import Observe, Progress, unobserved
from qwen_pipeline.reports import CheckReport, CheckSpec, dump_reports, load_reports

STAGE = "published"
CODE_VERSION = "2"
README, PROVENANCE, VALIDATION = "README.md", "provenance.json", "validation"

PASSED = CheckSpec(
    name="validation_passed", description="A validation of exactly these bytes passed every blocking check."
)
INTACT = CheckSpec(name="release_intact", description="Every file of the release has the SHA-256 that was validated.")
CHECKS = (PASSED, INTACT)


def publish(
    *,
    quantized: Path,
    validated: Path,
    destination: Destination,
    base_model: str,
    fine_tune: str,
    observe: Observe = unobserved,
) -> Artifact:
    """Make a release of a quantized checkpoint: its files, a model card, the validation report, its provenance.

    Args:
        quantized: The finished quantized checkpoint.
        validated: The finished validation of it.
        destination: Where the release goes.
        base_model: Hub id of the base, or its directory, for the card.
        fine_tune: The name of the release.
        observe: Told about bytes copied.

    Raises:
        CheckFailed: The validation is of other bytes, is incomplete, or a blocking check failed.
        CheckpointRefused: A file is not the one that was validated.
    """
    checkpoint, validation = open_manifest(quantized), open_manifest(validated)
    reports = _require_passed(checkpoint, validation, validated)
    derivation = Derivation(
        stage=STAGE,
        inputs={"quantized": checkpoint.content_digest, "validated": validation.content_digest},
        spec={"base_model": base_model, "fine_tune": fine_tune},
        code_version=CODE_VERSION,
    )

    def build(partial: Path) -> Built:
        released = _copy_files(checkpoint, quantized, partial, observe)
        released |= {
            f"{VALIDATION}/{path}": file
            for path, file in _copy_files(validation, validated, partial / VALIDATION, observe).items()
        }
        card = _card(partial, checkpoint, validation, base_model=base_model, fine_tune=fine_tune)
        (partial / README).write_text(card.render())
        (partial / PROVENANCE).write_text(_provenance(card))
        written = digest_files({name: partial / name for name in (README, PROVENANCE)})
        checks = [
            CheckReport(name=PASSED.name, passed=True, detail=verdict(reports).capitalize() + "."),
            CheckReport(name=INTACT.name, passed=True, measured=len(released), detail="Files read back and compared."),
        ]
        contents = Contents(tensors=checkpoint.contents.tensors, files=released | written)
        return Built(contents=contents, result={"checks": dump_reports(checks)})

    return derive(derivation, destination, build)


def _require_passed(checkpoint: Manifest, validation: Manifest, validated: Path) -> list[CheckReport]:
    of = validation.derivation.inputs.get("candidate")
    if of != checkpoint.content_digest:
        raise CheckFailed(
            f"{validated} is a validation of {of}, not of {checkpoint.content_digest}.",
            remedy="Validate this checkpoint: qwen-pipeline validate.",
        )
    reports = load_reports(validation.result)
    if missing := sorted({check.name for check in VALIDATION_CHECKS} - {report.name for report in reports}):
        raise CheckFailed(
            f"{validated} has no report on {listed(missing)}.", remedy="Validate the checkpoint with this version."
        )
    if failed := [f"{report.name}: {report.detail}" for report in reports if report.blocks]:
        raise CheckFailed(
            f"Validation failed, so {checkpoint.content_digest} is not published: {listed(failed)}",
            remedy="Correct what the report says and run its stages again.",
        )
    return reports


def _copy_files(manifest: Manifest, root: Path, out: Path, observe: Observe) -> dict[str, FileDigest]:
    """Copy the files of a finished directory, logs left out; read each copy back and compare it with the manifest.

    Every file of a release has a SHA-256 of its own, shards too, for whoever checks it with other tools.
    """
    files = {path: file for path, file in manifest.contents.files.items() if not path.startswith(LOGS)}
    released: dict[str, FileDigest] = {}
    done, total = 0, sum(file.bytes for file in files.values())
    for path, file in files.items():
        copy_file(root / path, out / path)
        released[path] = digest_file(out / path)
        found = released[path] if isinstance(file, FileDigest) else digest_shard(out / path)
        if found != file:
            raise _other_file(root / path)
        done += file.bytes
        observe(Progress(task=f"publish {manifest.derivation.stage}", done=done, total=total, unit="bytes"))
    if manifest.contents.tensors:
        copied = open_checkpoint(out)
        tensors = contents_of(copied, out, observe=observe).tensors
        for name in tensors:
            if tensors[name] != manifest.contents.tensors.get(name):
                raise _other_file(root / copied.shards[name])
    return released


def _other_file(path: Path) -> CheckpointRefused:
    return CheckpointRefused(
        f"{path} is not the file that was validated.",
        remedy=f"Delete {path.parent} and run its stage again; the result is the same.",
    )


def _card(release: Path, checkpoint: Manifest, validation: Manifest, *, base_model: str, fine_tune: str) -> ModelCard:
    findings, config = validation.result["findings"], open_checkpoint(release).config
    reports = load_reports(validation.result)
    return ModelCard(
        name=fine_tune,
        base_model=base_model,
        config=config,
        padding=[Widened(**size) for size in validation.result["padding"]],
        split=findings["structure"]["padding"]["twins"] > 0,
        quality=quality_table(load_figures(findings["models"]), findings["nbytes"]),
        verdict=verdict(reports),
        skipped=[f"`{report.name}`: {report.detail}" for report in reports if report.skipped],
        steps=[*map(load_step, validation.result["lineage"]), step_of(checkpoint), step_of(validation)],
    )


def _provenance(card: ModelCard) -> str:
    provenance = {
        "format": "qwen-pipeline/provenance/1",
        "fine_tune": card.name,
        "base_model": card.base_name,
        "steps": [dump_step(step) for step in card.steps],
    }
    return json.dumps(provenance, indent=2, ensure_ascii=False) + "\n"
