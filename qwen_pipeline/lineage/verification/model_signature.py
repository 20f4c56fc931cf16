"""``model.sig`` of OpenSSF Model Signing v1.0: a sigstore bundle that lists the SHA-256 of every file of a release.

The format is documented at https://github.com/sigstore/model-transparency; ``model_signing verify key`` accepts it.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from qwen_pipeline.checkpoint.files import read_regular
from qwen_pipeline.checkpoint.store.canonical import SIGNATURE
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.lineage.verification.envelopes import BUNDLE, PublicKey, open_envelope
from qwen_pipeline.lineage.verification.findings import Finding
from qwen_pipeline.lineage.verification.records import parse_object
from qwen_pipeline.lineage.verification.trust import Signer, keys_of

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://model_signing/signature/v1.0"
_BUNDLE = {"mediaType", "verificationMaterial", "dsseEnvelope"}
_ENVELOPE, _SIGNED = {"payload", "payloadType", "signatures"}, {"sig", "keyid"}
GIT = (".git", ".gitattributes", ".github", ".gitignore")
"""Paths that OpenSSF's tools leave out by themselves."""


def files_statement(name: str, sha256: Mapping[str, str]) -> dict[str, Any]:
    """Return the in-toto Statement over files, relative path -> hex SHA-256, of which ``model.sig`` is a bundle.

    Args:
        name: Name of the model; not verified.
        sha256: Every file of the directory but the signature.
    """
    ordered = sorted(sha256.items(), key=lambda item: PurePosixPath(item[0]))
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": _root(digest for _, digest in ordered)}}],
        "predicateType": PREDICATE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [*GIT, SIGNATURE],
            },
            "resources": [{"name": path, "algorithm": "sha256", "digest": digest} for path, digest in ordered],
        },
    }


def signed_files(root: Path, trusted: Sequence[Signer]) -> tuple[dict[str, str], PublicKey] | Finding:
    """Return the SHA-256 of each file that a release's signature lists, and its signer; or why it proves nothing."""
    path = root / SIGNATURE
    if not path.is_file():
        return _refuted(f"There is no {SIGNATURE}, so no signer vouches for this release.")
    try:
        bundle = parse_object(read_regular(path), SIGNATURE)
        opened = open_envelope(bundle["dsseEnvelope"], keys_of(bundle, trusted))
        if not opened:
            names = ", ".join(each.name for each in trusted)
            return _refuted(f"{SIGNATURE} is not signed by {names}.")
        payload, key = opened
        _require_form(bundle, key)
        return _resources(json.loads(payload)), key
    except CheckpointRefused as refused:
        return _refuted(refused.what)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return _refuted(f"{SIGNATURE} is damaged: {error}.")


def _require_form(bundle: Mapping[str, Any], key: PublicKey) -> None:
    """Require that the parts of a bundle that no signature covers are those of the format."""
    envelope, material = bundle["dsseEnvelope"], bundle["verificationMaterial"]
    if "certificate" not in material:  # of Sigstore, whose library verifies all of it
        by_key = {"publicKey": {"hint": key.keyid}, "tlogEntries": []}
        by_authority = {"x509CertificateChain": material.get("x509CertificateChain"), "tlogEntries": []}
        if material != (by_authority if "x509CertificateChain" in material else by_key):
            raise ValueError("it does not name the key that signed it, or has further parts")
    parts = [bundle.keys(), envelope.keys(), *(each.keys() | {"keyid"} for each in envelope["signatures"])]
    if bundle["mediaType"] != BUNDLE or parts != [_BUNDLE, _ENVELOPE, *[_SIGNED] * len(envelope["signatures"])]:
        raise ValueError(f"it is not a bundle of the form {BUNDLE}")
    if any(each.get("keyid") not in (None, "", key.keyid) for each in envelope["signatures"]):
        raise ValueError("it names another key than the one that signed it")


def confirmed_keys(root: Path, trusted: Sequence[Signer]) -> list[PublicKey]:
    """Return the keys that are trusted, and those that trusted authorities confirm in a directory's signature."""
    bundle: dict[str, Any] = {}
    with suppress(OSError, CheckpointRefused):  # a signature that is missing or damaged is a finding of its own
        bundle = parse_object(read_regular(root / SIGNATURE), SIGNATURE)
    return keys_of(bundle, trusted)


def signer_hint(root: Path) -> str | None:
    """Return the key id that a release's signature names, or a digest of the signer's certificate; None without one.

    Nothing is verified.
    """
    try:
        material = parse_object(read_regular(root / SIGNATURE), SIGNATURE)["verificationMaterial"]
        if "publicKey" in material:
            return str(material["publicKey"]["hint"])
        chain = material.get("x509CertificateChain", {}).get("certificates") or [material["certificate"]]
        return hashlib.sha256(base64.b64decode(chain[0]["rawBytes"])).hexdigest()
    except (OSError, CheckpointRefused, KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None


def _resources(statement: Mapping[str, Any]) -> dict[str, str]:
    if statement["_type"] != STATEMENT or statement["predicateType"] != PREDICATE:
        raise ValueError(f"its statement is {statement['predicateType']!r}, expected {PREDICATE!r}")
    resources = statement["predicate"]["resources"]
    if other := [each["algorithm"] for each in resources if each["algorithm"] != "sha256"]:
        raise ValueError(f"it lists {other[0]!r} digests, expected sha256")
    found = {str(each["name"]): str(each["digest"]) for each in resources}
    if len(found) != len(resources):
        raise ValueError("it lists a file twice")
    if statement["subject"][0]["digest"]["sha256"] != _root(each["digest"] for each in resources):
        raise ValueError("its subject is not the digest of the files that it lists")
    return found


def _root(digests: Any) -> str:
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def _refuted(detail: str) -> Finding:
    return Finding(name="signature", verdict="refuted", detail=detail)
