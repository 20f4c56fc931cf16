"""An authority, an intermediate one and a signer's certificate, as a company would make them."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

USAGES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip
SUBJECT = "CN=release,O=Acme"


class Party:
    """A key and its certificate, issued by another party or by itself.

    Args:
        name: Common name of the subject.
        issuer: The other party; None: itself.
        usage: The usage of the key: ``key_cert_sign`` makes it an authority.
        path_length: Greatest number of authorities below it.
        days: When it begins and ends to be valid, from today on.
        extension: Another extension, which must be understood.
    """

    def __init__(
        self,
        name: str,
        issuer: "Party | None" = None,
        *,
        usage: str = "key_cert_sign",
        path_length: int | None = None,
        days: tuple[int, int] = (-30, 30),
        extension: Any = None,
    ) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name.from_rfc4514_string(f"CN={name},O=Acme")
        begin, end = (datetime.now(UTC) + timedelta(days=each) for each in days)
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(issuer.name if issuer else self.name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(usage == "key_cert_sign", path_length), critical=True)
            .add_extension(x509.KeyUsage(**{each: each == usage for each in USAGES}), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.RFC822Name(f"{name}@acme.example")]), critical=False)
        )
        if extension:
            builder = builder.add_extension(extension, critical=True)
        self.certificate = builder.sign(issuer.key if issuer else self.key, SHA256())

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def write(self, root: Path, *between: "Party") -> None:
        """Write ``<root>.pem``, the key, and ``<root>.crt``, its certificate and intermediate ones."""
        pem = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        root.with_suffix(".pem").write_bytes(pem)
        root.with_suffix(".crt").write_bytes(b"".join(each.pem for each in (self, *between)))
