"""DSSE envelopes and ECDSA keys: https://github.com/secure-systems-lab/dsse, protocol 1.0."""

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_pipeline.errors import EnvironmentFault, InputRefused

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

IN_TOTO = "application/vnd.in-toto+json"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_CURVE = "secp256r1"
_MAKE_KEY = "To make one: openssl ecparam -name prime256v1 -genkey -noout -out key.pem; openssl ec -in key.pem -pubout."
_PUBLIC_KEY = (
    "Pass the signer's public key, or the certificate of an authority; openssl ec -in key.pem -pubout prints it."
)


@dataclass(frozen=True, kw_only=True)
class PublicKey:
    """A key that signatures are verified with: P-256, or of another curve if an authority certified it.

    Attributes:
        name: The signer's name in a policy, or the key's file.
    """

    name: str
    key: "EllipticCurvePublicKey"

    @cached_property
    def pem(self) -> bytes:
        from cryptography.hazmat.primitives import serialization

        return self.key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    @cached_property
    def keyid(self) -> str:
        """Hex SHA-256 of the PEM text, as OpenSSF Model Signing hints at a key."""
        return hashlib.sha256(self.pem).hexdigest()

    def has_signed(self, kind: str, payload: bytes, signature: bytes) -> bool:
        """Return whether a signature of a DSSE payload is this key's."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        by_curve = {"secp384r1": hashes.SHA384, "secp521r1": hashes.SHA512}
        algorithm = by_curve.get(self.key.curve.name, hashes.SHA256)()
        try:
            self.key.verify(signature, encoded(kind, payload), ec.ECDSA(algorithm))
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True, kw_only=True)
class SigningKey:
    """A P-256 key that signs.

    Attributes:
        certificates: Chain of certificates (DER) that confirms it, its own first; empty if verifiers know the key.
    """

    key: "EllipticCurvePrivateKey"
    certificates: tuple[bytes, ...] = ()

    @cached_property
    def public(self) -> PublicKey:
        return PublicKey(name="", key=self.key.public_key())

    @property
    def keyid(self) -> str:
        return self.public.keyid

    @property
    def material(self) -> dict[str, Any]:
        """The part of a bundle that names the signer."""
        chain = [{"rawBytes": base64.b64encode(each).decode()} for each in self.certificates]
        named = {"x509CertificateChain": {"certificates": chain}} if chain else {"publicKey": {"hint": self.keyid}}
        return {**named, "tlogEntries": []}

    def bundle(self, statement: Mapping[str, Any]) -> dict[str, Any]:
        """Return a sigstore bundle with a signed DSSE envelope of an in-toto Statement."""
        return {
            "mediaType": BUNDLE,
            "verificationMaterial": self.material,
            "dsseEnvelope": self.envelope(statement, keyid=""),
        }

    def envelope(self, statement: Mapping[str, Any], *, keyid: str) -> dict[str, Any]:
        """Return a signed DSSE envelope of an in-toto Statement."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        payload = json.dumps(statement, sort_keys=True, ensure_ascii=False).encode()
        signature = self.key.sign(encoded(IN_TOTO, payload), ec.ECDSA(hashes.SHA256()))
        return {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": IN_TOTO,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": keyid}],
        }


def encoded(kind: str, payload: bytes) -> bytes:
    """Return the bytes that a DSSE signature covers: the pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(kind.encode()), kind.encode(), len(payload), payload)


def open_envelope(envelope: Mapping[str, Any], keys: list[PublicKey]) -> tuple[bytes, PublicKey] | None:
    """Return the payload of an envelope and the key that signed it; None if none of the keys did.

    Raises:
        ValueError: It is not a DSSE envelope of an in-toto Statement.
    """
    try:
        payload = _decoded(envelope["payload"])
        signatures = [_decoded(each["sig"]) for each in envelope["signatures"]]
        kind = envelope["payloadType"]
    except (KeyError, TypeError, binascii.Error, AttributeError) as error:
        raise ValueError(f"it is no DSSE envelope ({error!r})") from error
    if kind != IN_TOTO:
        raise ValueError(f"its payload is {kind!r}, expected {IN_TOTO!r}")
    signed = ((payload, key) for key in keys for each in signatures if key.has_signed(kind, payload, each))
    return next(signed, None)


def _decoded(text: str) -> bytes:
    """Decode base64; two texts never stand for the same bytes."""
    data = base64.b64decode(text, validate=True)
    if base64.b64encode(data).decode() != text:
        raise binascii.Error("bits that do not count are set")
    return data


def load_public_key(path: Path, name: str | None = None) -> PublicKey:
    """Read a P-256 public key from a PEM file.

    Raises:
        InputRefused: The file is missing or holds another kind of key.
        EnvironmentFault: ``cryptography`` is not installed.
    """
    serialization, ec = _cryptography()
    try:
        key = serialization.load_pem_public_key(read_key_file(path))
    except ValueError as error:
        raise _no_key(path, "public", str(error)) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != _CURVE:
        raise _no_key(path, "public", f"it holds {_kind(key)}")
    return PublicKey(name=name or path.name, key=key)


def load_signing_key(path: Path, passphrase: str | None = None) -> SigningKey:
    """Read a P-256 private key from a PEM file, which may be encrypted.

    Raises:
        InputRefused: The file is missing, holds another kind of key, or the passphrase is missing, wrong or not needed.
        EnvironmentFault: ``cryptography`` is not installed.
    """
    serialization, ec = _cryptography()
    try:
        key = serialization.load_pem_private_key(read_key_file(path), passphrase.encode() if passphrase else None)
    except (ValueError, TypeError) as error:
        raise _no_key(path, "private", str(error)) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != _CURVE:
        raise _no_key(path, "private", f"it holds {_kind(key)}")
    return SigningKey(key=key)


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise EnvironmentFault(
            "Signatures need the package cryptography, which is not installed.",
            remedy="Install it: pip install cryptography.",
        ) from error
    return serialization, ec


def read_key_file(path: Path) -> bytes:
    """Read a PEM file.

    Raises:
        InputRefused: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputRefused(
            f"The key {path} cannot be read: {error.strerror}.", remedy=f"Pass a PEM file. {_MAKE_KEY}"
        ) from error


def _no_key(path: Path, kind: str, why: str) -> InputRefused:
    what = f"{path} is not a {kind} P-256 key in PEM that can be read: {why.rstrip('.')}."
    return InputRefused(what, remedy=_MAKE_KEY if kind == "private" else _PUBLIC_KEY)


def _kind(key: object) -> str:
    return f"{type(key).__name__} {getattr(getattr(key, 'curve', None), 'name', '')}".strip()
