"""Verification of a release: signature, every byte, the order of its stages, and a policy."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_pipeline.checkpoint.store.canonical import ATTESTATIONS, MANIFEST_FILE, PROVENANCE, SIGNATURE
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.lineage.verification.envelopes import PublicKey, open_envelope
from qwen_pipeline.lineage.verification.findings import Finding, Verdict, refuted
from qwen_pipeline.lineage.verification.hashing import can_hash_tensors
from qwen_pipeline.lineage.verification.intact import RELEASE, compare, files_below
from qwen_pipeline.lineage.verification.model_signature import signed_files, signer_hint
from qwen_pipeline.lineage.verification.order import by_digest, prove_order, prove_release
from qwen_pipeline.lineage.verification.policy import Policy, apply_policy
from qwen_pipeline.lineage.verification.records import (
    REPORT,
    Record,
    RecordedStep,
    parse_object,
    read_record,
    read_steps,
    step_from_json,
)
from qwen_pipeline.lineage.verification.trust import Signer


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The findings about one directory.

    Attributes:
        content_digest: Content digest of the release; None if its manifest cannot be read.
        signer: Name of the key that signed it, if a trusted one did.
        files: Number of files that were read.
        nbytes: Their size.
    """

    root: Path
    content_digest: str | None
    signer: str | None
    files: int
    nbytes: int
    findings: Sequence[Finding]

    @property
    def faults(self) -> list[Finding]:
        return refuted(self.findings)

    def to_json(self) -> dict[str, Any]:
        return {
            "directory": str(self.root),
            "verified": not self.faults,
            "content_digest": self.content_digest,
            "signer": self.signer,
            "files": self.files,
            "bytes": self.nbytes,
            "findings": [finding.to_json() for finding in self.findings],
        }


def verify(root: Path, *, keys: Sequence[Signer] = (), policy: Policy | None = None) -> Verification:
    """Verify a release, and read every byte of it once.

    Args:
        root: The release.
        keys: Signers of which one must have signed it, besides those of the policy.
        policy: What the host demands.

    Raises:
        CheckpointRefused: The directory has no manifest, or is not a release.
    """
    if not (root / MANIFEST_FILE).is_file():
        read_record(root)  # raises: there is nothing to verify
    try:
        record = read_record(root)
    except CheckpointRefused as refused:
        finding = Finding(name="manifest", verdict="refuted", detail=refused.what)
        return Verification(root=root, content_digest=None, signer=None, files=0, nbytes=0, findings=[finding])
    if record.step.stage != RELEASE:
        raise CheckpointRefused(
            f"{root} holds a {record.step.stage} output, not a release.",
            remedy="Pass a published directory; qwen-pipeline audit takes any.",
        )
    return judge(record, compare(record), keys=keys, policy=policy)


def judge(
    record: Record, wrong: Mapping[str, str], *, keys: Sequence[Signer] = (), policy: Policy | None = None
) -> Verification:
    """Verify a release whose bytes were compared with its manifest; ``wrong`` is the result of :func:`compare`."""
    signature, signer = _signature(record, [*keys, *(policy.signers if policy else ())])
    findings = [
        Finding(name="manifest", verdict="proven", detail="Its digests agree with each other."),
        *signature,
        *_files(record, wrong),
        *_contents(record, policy, wrong, verdict="attested" if signer else "claimed"),
    ]
    return Verification(
        root=record.root,
        content_digest=record.step.content_digest,
        signer=signer.name if signer else None,
        files=len(record.files) + 1,
        nbytes=record.nbytes,
        findings=findings,
    )


def _files(record: Record, wrong: Mapping[str, str]) -> list[Finding]:
    if wrong:
        return [Finding(name="files", verdict="refuted", detail=f"{path} {why}.") for path, why in wrong.items()]
    found = [Finding(name="files", verdict="proven", detail=f"{len(record.files)} files have the stated SHA-256.")]
    if can_hash_tensors():
        detail = f"{len(record.tensors)} tensors have the digests that the release's lineage is made of."
        return [*found, Finding(name="tensors", verdict="proven", detail=detail)]
    detail = "Digests of tensors were compared when it was published; install blake3 to compare them here."
    return [*found, Finding(name="tensors", verdict="claimed", detail=detail)]


def _signature(record: Record, trusted: Sequence[Signer]) -> tuple[list[Finding], PublicKey | None]:
    """Return whether a trusted key signed every file, and the provenance, and which key it was."""
    if not trusted:
        hint = signer_hint(record.root)
        detail = f"It names the key {hint[:16]}, of which none was given." if hint else "It is not signed."
        if not hint and (beside := [name for name in ATTESTATIONS if (record.root / name).exists()]):
            detail = f"It is not signed, so nothing covers {', '.join(beside)}."
        return [Finding(name="signature", verdict="claimed", detail=detail)], None
    signed = signed_files(record.root, trusted)
    if isinstance(signed, Finding):
        return [signed], None
    sha256, key = signed
    wrong = _unlike(record, sha256)
    if wrong:
        return [Finding(name="signature", verdict="refuted", detail=f"{each}.") for each in wrong], None
    detail = f"{SIGNATURE} lists {len(sha256)} files and is signed by {key.name} ({key.keyid[:16]})."
    provenance = _provenance(record, key) if PROVENANCE in sha256 else []
    found = [Finding(name="signature", verdict="proven", detail=detail), *provenance]
    return found, None if refuted(found) else key


def _unlike(record: Record, signed: Mapping[str, str]) -> list[str]:
    """Compare the signed list with the manifest's, and hash the files that the manifest does not list."""
    here = files_below(record.root, attestations=True)
    here.pop(SIGNATURE, None)
    here[MANIFEST_FILE] = record.root / MANIFEST_FILE
    stated = record.sha256()
    for path in sorted(here.keys() - stated.keys()):
        stated[path] = hashlib.sha256(here[path].read_bytes()).hexdigest() if here[path].is_file() else ""
    return [
        *(f"{path} is signed, and missing" for path in sorted(signed.keys() - here.keys())),
        *(f"{path} is not signed" for path in sorted(here.keys() - signed.keys())),
        *(f"{path} is not the file that was signed" for path in sorted(signed) if stated.get(path) != signed[path]),
    ]


def _provenance(record: Record, key: PublicKey) -> list[Finding]:
    """Return whether the signed provenance is of these files."""
    try:
        opened = open_envelope(parse_object((record.root / PROVENANCE).read_bytes(), PROVENANCE), [key])
        if not opened:
            return [_refuted("provenance", f"{PROVENANCE} is not signed by {key.name}.")]
        statement = parse_object(opened[0], PROVENANCE)
        subjects = {str(each["name"]): str(each["digest"]["sha256"]) for each in statement["subject"]}
    except CheckpointRefused as refused:
        return [_refuted("provenance", refused.what)]
    except (KeyError, TypeError, ValueError) as error:
        return [_refuted("provenance", f"{PROVENANCE} is damaged: {error!r}.")]
    stated = record.sha256()
    if other := [path for path in stated.keys() | subjects.keys() if stated.get(path) != subjects.get(path)]:
        return [_refuted("provenance", f"{PROVENANCE} is about another {sorted(other)[0]}.")]
    detail = f"{PROVENANCE} is about these {len(subjects)} files and is signed by {key.name}."
    return [Finding(name="provenance", verdict="proven", detail=detail)]


def _contents(record: Record, policy: Policy | None, wrong: Mapping[str, str], *, verdict: Verdict) -> list[Finding]:
    """Return the findings about the order and the policy, which are read from files that must be intact."""
    if wrong:
        return []
    try:
        report = parse_object((record.root / REPORT).read_bytes(), REPORT)
        steps = [*read_steps(record.root), *map(step_from_json, report.get("lineage", ())), record.step]
        checks = [dict(check) for check in report["checks"]]
        candidate = str(report["candidate"])
    except (CheckpointRefused, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        return [_refuted("order", f"{REPORT} or the recorded steps cannot be read: {error}.")]
    proven = prove_release(record, candidate, verdict="proven" if can_hash_tensors() else verdict)
    order = prove_order(record.step, by_digest(steps), lambda _: verdict)
    return [*proven, *order, *(apply_policy(policy, checks, _unique(steps), verdict=verdict) if policy else [])]


def _unique(steps: Sequence[RecordedStep]) -> list[RecordedStep]:
    return list({(step.stage, step.content_digest): step for step in steps}.values())


def _refuted(name: str, detail: str) -> Finding:
    return Finding(name=name, verdict="refuted", detail=detail)
