"""Keyless signing with Sigstore: a key that lives for minutes, confirmed for an account, in a public log.

It needs the network and the package ``sigstore``. Verification of such signatures needs no network
(:class:`~qwen_pipeline.lineage.verification.trust.Identity`).
"""

import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qwen_pipeline.errors import EnvironmentFault, InputRefused

TOKEN_VARIABLE = "SIGSTORE_ID_TOKEN"  # noqa: S105 (a name)
"""The environment variable of an OpenID Connect token for the audience ``sigstore``."""


@dataclass(frozen=True, kw_only=True)
class KeylessKey:
    """A key that Sigstore confirmed for an account.

    Attributes:
        keyid: The account, as Sigstore's certificate names it.
        signer: ``sigstore.sign.Signer``, which signs and writes to the log.
    """

    keyid: str
    signer: Any

    def bundle(self, statement: Mapping[str, Any]) -> dict[str, Any]:
        """Return a bundle with the signed envelope, the certificate and the entry of the log."""
        from sigstore.dsse import Statement

        return json.loads(self.signer.sign_dsse(Statement(json.dumps(statement).encode())).to_json())

    def envelope(self, statement: Mapping[str, Any], *, keyid: str) -> dict[str, Any]:  # noqa: ARG002
        """Return a signed DSSE envelope; the certificate of its key is in the bundle of the same release."""
        return self.bundle(statement)["dsseEnvelope"]


@contextmanager
def keyless() -> Generator[KeylessKey]:
    """Yield a key for the account of this machine's OpenID Connect token; no browser is opened.

    Raises:
        InputRefused: There is no token, or Sigstore does not accept it.
        EnvironmentFault: ``sigstore`` is not installed, or its services cannot be reached.
    """
    try:
        from sigstore.errors import Error
        from sigstore.models import ClientTrustConfig
        from sigstore.oidc import IdentityError, IdentityToken, detect_credential
        from sigstore.sign import SigningContext
    except ImportError as error:
        raise EnvironmentFault(
            "Keyless signing needs the package sigstore, which is not installed.",
            remedy="Install it: pip install 'qwen-pipeline[sigstore]'.",
        ) from error
    try:
        token = IdentityToken(os.environ.get(TOKEN_VARIABLE) or detect_credential() or "")
    except IdentityError as error:
        raise InputRefused(
            f"There is no OpenID Connect token that Sigstore takes: {error}.",
            remedy=f"Run it where the CI gives one, or set {TOKEN_VARIABLE}; or sign with --key.",
        ) from error
    try:
        context = SigningContext.from_trust_config(ClientTrustConfig.production())
        with context.signer(token) as signer:
            yield KeylessKey(keyid=token.identity, signer=signer)
    except (Error, OSError) as error:
        raise EnvironmentFault(
            f"Sigstore did not sign: {error}.",
            remedy="Sign where fulcio.sigstore.dev and rekor.sigstore.dev can be reached, or with --key.",
        ) from error
