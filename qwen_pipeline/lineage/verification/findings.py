"""Findings of an audit: a statement, and whether bytes prove it, a signer vouches for it, or it is only recorded."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["proven", "attested", "claimed", "refuted"]
"""``proven``: bytes that are here give the digest. ``attested``: recorded, in files that a trusted key signed.
``claimed``: recorded, and neither its bytes nor a signature is here. ``refuted``: bytes or records contradict it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One statement about a directory and its verdict.

    Attributes:
        name: Identifier of the statement, such as ``padding_before_quantization``.
        detail: One sentence: what was compared, or what differs.
    """

    name: str
    verdict: Verdict
    detail: str

    @property
    def holds(self) -> bool:
        """False if it is refuted."""
        return self.verdict != "refuted"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def in_one_line(text: str) -> str:
    r"""Return a text with an escape such as ``\n`` or ``\x1b`` for each character that a terminal would not show.

    Names of files are whatever was uploaded, and may look like a finding of their own.
    """
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def refuted(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings that contradict a statement."""
    return [finding for finding in findings if not finding.holds]
