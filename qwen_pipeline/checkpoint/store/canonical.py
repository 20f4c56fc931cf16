"""Canonical JSON and what a content digest covers, with the standard library alone."""

import hashlib
import json
from collections.abc import Mapping, Sequence

INDEX_FILE, MANIFEST_FILE = "model.safetensors.index.json", "manifest.json"
LOGS = "logs/"
"""Files below this folder are kept and listed, but are not part of the content digest: they hold times and hosts."""
BOM, PROVENANCE, SIGNATURE = "bom.cdx.json", "provenance.intoto.jsonl", "model.sig"
ATTESTATIONS = (BOM, PROVENANCE, SIGNATURE)
"""Files that may join a finished release, in the order they are written; no manifest lists them."""
BEFORE = "before"
"""Role of the quantized checkpoint of an earlier version that a validation compares with: nothing is made from it."""


def canonical_sha256(value: object) -> str:
    """Return the hex SHA-256 of a JSON value with sorted keys and no white space."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def is_content(path: str) -> bool:
    """Return whether a file counts towards the content digest; weights count by tensor, and logs do not count."""
    return not (path.endswith(".safetensors") or path in (INDEX_FILE, MANIFEST_FILE) or path.startswith(LOGS))


def content_digest(tensors: Mapping[str, Sequence[object]], sha256: Mapping[str, str]) -> str:
    """Return the content digest, ``sha256:<hex>``.

    Args:
        tensors: Name -> dtype, shape and ``tree_blake3``.
        sha256: Relative path -> hex SHA-256 of each file; those that are not content are left out.
    """
    files = {path: digest for path, digest in sha256.items() if is_content(path)}
    return "sha256:" + canonical_sha256(
        {"tensors": {name: list(each) for name, each in tensors.items()}, "files": files}
    )
