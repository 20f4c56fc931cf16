"""The checks that a release has to pass before ``production`` leads to it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qwen_pipeline.checkpoint.lazy import MANIFEST
from qwen_pipeline.errors import CheckpointRefused, listed
from qwen_pipeline.evaluation.regression import compare, load_verdict
from qwen_pipeline.lineage.log_proof import open_log
from qwen_pipeline.lineage.pointers import History
from qwen_pipeline.lineage.verification.envelopes import PublicKey
from qwen_pipeline.lineage.verification.policy import Policy
from qwen_pipeline.lineage.verification.verify import verify
from qwen_pipeline.reports import CheckReport, CheckSpec

STANDS = CheckSpec(
    name="verdict_stands",
    description="Every byte is the one that passed validation, and nothing that the release is made of was recalled.",
)
APPROVED = CheckSpec(
    name="approved",
    description="The release was approved, where approval is required, and it was not revoked.",
)
NOT_WORSE = CheckSpec(
    name="not_worse_than_production",
    description="On the same text, the quantized model is not worse than in the release that production leads to.",
    blocking=False,
)
CHECKS = (STANDS, APPROVED, NOT_WORSE)


def verdict_stands(store: Path, release: Path, keys: Sequence[PublicKey] | None) -> CheckReport:
    """Read every byte of a release, and report whether its verdict stands.

    Args:
        store: The store, whose log has the recalls.
        release: The release.
        keys: Keys of which one must have signed the release; None if none has to.
    """
    policy = Policy(recalled=tuple(open_log(store).recalled))
    try:
        found = verify(release, keys=list(keys or ()), policy=policy)
    except CheckpointRefused as refused:
        return STANDS.report(passed=False, detail=refused.what)
    faults = [f"{fault.name}: {fault.detail}" for fault in found.faults]
    return STANDS.report(
        passed=not faults,
        measured=float(len(faults)),
        limit=0.0,
        detail=listed(faults) if faults else f"{found.files} files are those that passed validation.",
    )


def approved(stated: History, release: Path, *, required: bool) -> CheckReport:
    """Report on the last statement about a release; without one, it waits if approval is required."""
    verdict = stated.verdict(release)
    command = f'qwen-pipeline approve {stated.product} --release {release.name} --reason "..."'
    if verdict and verdict.event == "revoked":
        detail = f"Revoked by {verdict.by} at {verdict.time}: {verdict.reason} To approve it again: {command}"
        return APPROVED.report(passed=False, detail=detail)
    if verdict:
        signed = f", with the key {verdict.keyid[:16]}" if verdict.keyid else ""
        detail = f"Approved by {verdict.by} at {verdict.time}{signed}: {verdict.reason}"
        return APPROVED.report(passed=True, detail=detail)
    if required:
        return APPROVED.report(passed=False, detail=f"{release.name} waits for approval. To approve it: {command}")
    return APPROVED.report(passed=True, detail="No approval is required.")


def not_worse(production: Path | None, release: Path) -> CheckReport:
    """Compare a release with the one in production, if it is another and still there."""
    if production is None or not (production / MANIFEST).is_file():
        return NOT_WORSE.skipped("No release is in production.")
    if production.resolve() == release.resolve():
        return NOT_WORSE.report(passed=True, detail="It is in production.")
    try:
        found = compare(load_verdict(production), load_verdict(release))
    except CheckpointRefused as refused:
        return NOT_WORSE.report(passed=False, detail=f"Not compared: {refused.what}")
    return replace(found, name=NOT_WORSE.name)
