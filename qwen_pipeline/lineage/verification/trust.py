"""The signers that a verifier trusts: a key, an authority that certifies keys, or an identity that Sigstore confirmed.

A bundle names its signer in one of three ways: by a hint at a key, by a chain of X.509 certificates, or by a
certificate of Sigstore with entries of its transparency log. Nothing here needs the network.
"""

import base64
import binascii
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_pipeline.errors import EnvironmentFault, InputRefused
from qwen_pipeline.lineage.verification.envelopes import PublicKey, load_public_key, read_key_file

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

_MOST_CERTIFICATES = 8


@dataclass(frozen=True, kw_only=True)
class Authority:
    """An authority whose certificates confirm keys.

    Attributes:
        name: The signer's name in a policy, or the file.
        certificates: The authority's own; a chain has to end at one of them.
        subject: Subject (``CN=release,O=Acme``), e-mail address, URI or host name that the signer's certificate must
            have; empty: any.
    """

    name: str
    certificates: Sequence["Certificate"]
    subject: str = ""

    def key_of(self, material: Mapping[str, Any], bundle: Mapping[str, Any]) -> PublicKey | None:  # noqa: ARG002
        """Return the key that a bundle's certificates confirm; None if they do not lead to this authority."""
        try:
            chain = _chain(material["x509CertificateChain"]["certificates"])
        except (KeyError, TypeError, ValueError):
            return None
        if not chain or not _leads_to(chain, self.certificates):
            return None
        names = _names(leaf := chain[0])
        if self.subject and self.subject not in names:
            return None
        expired = leaf.not_valid_after_utc < datetime.now(UTC)
        until = f", certified until {leaf.not_valid_after_utc:%Y-%m-%d}" if expired else ""
        return _key(f"{self.name}: {names[0]}{until}", leaf)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """An account that Sigstore confirmed when it signed, such as an e-mail address or a workflow.

    Attributes:
        name: The signer's name in a policy, or the identity.
        identity: The account, as in the certificate.
        issuer: URL of the OpenID Connect issuer that confirmed it.
    """

    name: str
    identity: str
    issuer: str

    def key_of(self, material: Mapping[str, Any], bundle: Mapping[str, Any]) -> PublicKey | None:
        """Return the key of a bundle whose certificate and log entries hold for this identity; None otherwise.

        Raises:
            EnvironmentFault: ``sigstore`` is not installed.
        """
        if "certificate" not in material:
            return None
        try:
            from sigstore.errors import Error
            from sigstore.models import Bundle, ClientTrustConfig
            from sigstore.verify import Verifier, policy
        except ImportError as error:
            raise EnvironmentFault(
                "Signatures of Sigstore need the package sigstore, which is not installed.",
                remedy="Install it: pip install sigstore.",
            ) from error
        try:
            signed = Bundle.from_json(json.dumps(bundle))
            verifier = Verifier(trusted_root=ClientTrustConfig.production(offline=True).trusted_root)
            verifier.verify_dsse(signed, policy.Identity(identity=self.identity, issuer=self.issuer))
        except (Error, ValueError):
            return None
        return _key(f"{self.identity} ({self.issuer})", signed.signing_certificate)


Signer = PublicKey | Authority | Identity


def keys_of(bundle: Mapping[str, Any], trusted: Sequence[Signer]) -> list[PublicKey]:
    """Return the keys that may have signed a bundle: those that are trusted, and those that others confirm in it."""
    material: Mapping[str, Any] = bundle.get("verificationMaterial") or {}
    keys = (each if isinstance(each, PublicKey) else each.key_of(material, bundle) for each in trusted)
    return [key for key in keys if key]


def given_signers(files: Sequence[Path], identity: str | None = None, issuer: str | None = None) -> list[Signer]:
    """Return the signers that options name.

    Raises:
        InputRefused: A file holds neither key nor certificate, or an identity has no issuer.
    """
    if bool(identity) != bool(issuer):
        raise InputRefused("An identity and its issuer belong together.", remedy="Pass both --identity and --issuer.")
    of_sigstore = [Identity(name=identity, identity=identity, issuer=issuer)] if identity and issuer else []
    return [*map(load_signer, files), *of_sigstore]


def load_signer(path: Path, name: str | None = None, *, subject: str = "") -> PublicKey | Authority:
    """Read a P-256 public key, or the certificates of an authority, from a PEM file.

    Raises:
        InputRefused: The file is missing or holds something else.
        EnvironmentFault: ``cryptography`` is not installed.
    """
    if b"BEGIN CERTIFICATE" not in (data := read_key_file(path)):
        if subject:
            raise InputRefused(f"{path} holds no certificate, so it has no subject.", remedy="Leave out the subject.")
        return load_public_key(path, name)
    return Authority(name=name or path.name, certificates=load_certificates(path, data), subject=subject)


def load_certificates(path: Path, data: bytes | None = None) -> list["Certificate"]:
    """Read the certificates of a PEM file, in their order.

    Raises:
        InputRefused: It cannot be read, or holds none.
    """
    try:
        from cryptography import x509

        return x509.load_pem_x509_certificates(read_key_file(path) if data is None else data)
    except ImportError as error:
        raise EnvironmentFault(
            "Certificates need the package cryptography, which is not installed.",
            remedy="Install it: pip install cryptography.",
        ) from error
    except ValueError as error:
        raise InputRefused(
            f"{path} holds no X.509 certificates in PEM that can be read: {error}.",
            remedy="Pass the certificate of the authority; to sign, that of the key, followed by intermediate ones.",
        ) from error


def _chain(certificates: Sequence[Mapping[str, Any]]) -> list["Certificate"]:
    from cryptography import x509

    if len(certificates) > _MOST_CERTIFICATES:
        raise ValueError(f"it has {len(certificates)} certificates")
    try:
        raw = [base64.b64decode(each["rawBytes"], validate=True) for each in certificates]
    except binascii.Error as error:
        raise ValueError(str(error)) from error
    return [x509.load_der_x509_certificate(each) for each in raw]


def _leads_to(chain: Sequence["Certificate"], anchors: Sequence["Certificate"]) -> bool:
    """Return whether the first certificate may sign, and each is issued by the next one, up to an anchor.

    As with OpenSSF's verifier, all must have been valid at the beginning of the first one's validity, not now: a
    release outlives its signer's certificate. Revocation lists are not read.
    """
    leaf, *others = chain
    at, current = leaf.not_valid_before_utc, leaf
    if not _may_sign(leaf):
        return False
    for depth in range(len(others) + 1):
        if any(_issued(current, anchor, at, depth) for anchor in anchors):
            return True
        if depth == len(others) or not _issued(current, others[depth], at, depth):
            return False
        current = others[depth]
    return False


def _issued(certificate: "Certificate", issuer: "Certificate", at: datetime, depth: int) -> bool:
    """Return whether an authority's certificate, with ``depth`` others below it, signed a certificate."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    constraints, usage = (_extension(issuer, kind) for kind in (x509.BasicConstraints, x509.KeyUsage))
    is_authority = (
        constraints is not None
        and constraints.ca
        and (constraints.path_length is None or depth <= constraints.path_length)
        and (usage is None or usage.key_cert_sign)
        and issuer.not_valid_before_utc <= at <= issuer.not_valid_after_utc
        and _is_understood(issuer)
    )
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return is_authority


def _may_sign(leaf: "Certificate") -> bool:
    from cryptography import x509

    usage, extended = (_extension(leaf, kind) for kind in (x509.KeyUsage, x509.ExtendedKeyUsage))
    codes = x509.oid.ExtendedKeyUsageOID.CODE_SIGNING
    return _is_understood(leaf) and bool((usage and usage.digital_signature) or (extended and codes in extended))


def _is_understood(certificate: "Certificate") -> bool:
    """Return whether every extension that must be understood is."""
    from cryptography import x509

    known = (x509.BasicConstraints, x509.KeyUsage, x509.ExtendedKeyUsage, x509.SubjectAlternativeName)
    return all(isinstance(each.value, known) for each in certificate.extensions if each.critical)


def _extension(certificate: "Certificate", kind: type[Any]) -> Any:
    from cryptography import x509

    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _names(certificate: "Certificate") -> list[str]:
    """Return the subject of a certificate and its alternative names."""
    from cryptography import x509

    def alternatives() -> Iterator[str]:
        found = _extension(certificate, x509.SubjectAlternativeName)
        for kind in (x509.RFC822Name, x509.UniformResourceIdentifier, x509.DNSName):
            yield from found.get_values_for_type(kind) if found else ()

    names = [certificate.subject.rfc4514_string(), *alternatives()]
    return [name for name in names if name] or [""]


def _key(name: str, certificate: "Certificate") -> PublicKey | None:
    from cryptography.hazmat.primitives.asymmetric import ec

    key = certificate.public_key()
    return PublicKey(name=name, key=key) if isinstance(key, ec.EllipticCurvePublicKey) else None
