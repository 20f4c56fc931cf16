"""Signing of a release: BOM, provenance and signature join a finished directory, in this order.

Each is covered by what follows: the provenance lists the files of the manifest, and ``model.sig`` lists the manifest,
the BOM and the provenance too. Nothing contains its own digest, and the manifest stays as it is.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from qwen_pipeline.checkpoint.files import load_json, open_locked, write_bytes
from qwen_pipeline.checkpoint.store import log
from qwen_pipeline.checkpoint.store.canonical import BOM, MANIFEST_FILE, PROVENANCE, SIGNATURE
from qwen_pipeline.checkpoint.store.log import head, logged_store
from qwen_pipeline.errors import CheckpointRefused, DestinationLocked, InputRefused, listed
from qwen_pipeline.lineage.bom import ml_bom
from qwen_pipeline.lineage.provenance import provenance
from qwen_pipeline.lineage.verification.envelopes import SigningKey, load_signing_key
from qwen_pipeline.lineage.verification.findings import Finding
from qwen_pipeline.lineage.verification.intact import RELEASE, compare
from qwen_pipeline.lineage.verification.model_signature import files_statement, signed_files
from qwen_pipeline.lineage.verification.records import REPORT, Record, read_record, read_steps
from qwen_pipeline.lineage.verification.trust import load_certificates

PASSPHRASE_VARIABLE = "QWEN_PIPELINE_KEY_PASSPHRASE"  # noqa: S105 (a name)
"""The environment variable of a signing key's passphrase."""


class Signs(Protocol):
    """A key that signs in-toto Statements.

    Attributes:
        keyid: Its identifier in the store's log.
    """

    @property
    def keyid(self) -> str: ...

    def bundle(self, statement: Mapping[str, Any]) -> dict[str, Any]:
        """Return a sigstore bundle, which names the signer."""
        ...

    def envelope(self, statement: Mapping[str, Any], *, keyid: str) -> dict[str, Any]:
        """Return a DSSE envelope of the same key."""
        ...


def load_key(path: Path, certificate: Path | None = None) -> SigningKey:
    """Read a P-256 private key from a PEM file, with the passphrase in the environment if it is encrypted.

    Args:
        path: The key.
        certificate: PEM file of the certificate that confirms it, followed by intermediate ones.

    Raises:
        InputRefused: It is missing, holds another kind of key, the passphrase does not fit, or the certificate is of
            another key.
    """
    key = load_signing_key(path, os.environ.get(PASSPHRASE_VARIABLE))
    return replace(key, certificates=_certificates(key, certificate)) if certificate else key


def _certificates(key: SigningKey, path: Path) -> tuple[bytes, ...]:
    from cryptography.hazmat.primitives.serialization import Encoding

    chain = load_certificates(path)
    if not chain or chain[0].public_key() != key.key.public_key():
        raise InputRefused(
            f"The first certificate of {path} is not one of the signing key.",
            remedy="Put the certificate that the authority made for this key first, then intermediate ones.",
        )
    return tuple(each.public_bytes(Encoding.DER) for each in chain)


def sign_release(root: Path, key: Signs, *, compared: bool = False) -> bool:
    """Sign a finished release; return False if it has a signature of this key over the same files.

    Args:
        root: The release.
        key: The signer's key.
        compared: Whether its files were compared with its manifest just now. If not, every byte is read.

    Raises:
        CheckpointRefused: It is not a release, or a file is not the one in its manifest.
        DestinationLocked: Another process is signing it.
    """
    record = _require_release(root)
    with _lock(root):
        if _is_signed(record, key):
            return False
        if not compared and (wrong := compare(record)):
            differences = listed([f"{path} {why}" for path, why in sorted(wrong.items())])
            raise CheckpointRefused(
                f"{root} is not signed, because it does not match its manifest: {differences}.",
                remedy="Delete it and publish again.",
            )
        (root / SIGNATURE).unlink(missing_ok=True)
        for name, content in _attestations(record, key).items():
            write_bytes(root / name, content)
        if store := logged_store(root):
            log.record(store, root, "signed", detail=key.keyid)
    return True


def _attestations(record: Record, key: Signs) -> dict[str, bytes]:
    """Return file name -> content, in the order to write them."""
    root, steps = record.root, read_steps(record.root)
    bom = ml_bom(record, steps, load_json(root / REPORT), load_json(root / "config.json"))
    contents = {BOM: _text(bom, indent=2)}
    store = logged_store(root)
    statement = provenance(record, steps, head(store) if store else None)
    contents[PROVENANCE] = _text(key.envelope(statement, keyid=key.keyid))
    manifest = {MANIFEST_FILE: (root / MANIFEST_FILE).read_bytes()}
    beside = {name: hashlib.sha256(data).hexdigest() for name, data in {**manifest, **contents}.items()}
    name = f"{record.step.spec.get('fine_tune')}@{record.step.key[:16]}"
    contents[SIGNATURE] = _text(key.bundle(files_statement(name, record.sha256() | beside)))
    return contents


def _is_signed(record: Record, key: Signs) -> bool:
    """Return whether this key signed these files; the BOM and the provenance must be there unchanged."""
    if not isinstance(key, SigningKey):  # the next signature is of another key
        return False
    signed = signed_files(record.root, [key.public])
    if isinstance(signed, Finding) or load_json(record.root / SIGNATURE)["verificationMaterial"] != key.material:
        return False
    expected = record.sha256()
    for name in (MANIFEST_FILE, BOM, PROVENANCE):
        if not (record.root / name).is_file():
            return False
        expected[name] = hashlib.sha256((record.root / name).read_bytes()).hexdigest()
    return signed[0] == expected


def _require_release(root: Path) -> Record:
    record = read_record(root)
    if record.step.stage != RELEASE:
        raise CheckpointRefused(
            f"{root} holds a {record.step.stage} output; only releases are signed.",
            remedy="Publish it: qwen-pipeline publish.",
        )
    return record


def _lock(root: Path) -> Any:
    try:
        return open_locked(root.with_name(root.name + ".lock"))
    except BlockingIOError as error:
        raise DestinationLocked(
            f"Another process is writing {root}.", remedy="Wait for it to end, or end it, then run again."
        ) from error


def _text(value: Mapping[str, Any], indent: int | None = None) -> bytes:
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode()
