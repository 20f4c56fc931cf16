"""Approval, promotion and rollback: statements about releases, and moves of the pointer ``production``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_pipeline.config import Settings
from qwen_pipeline.config.inputs import signing_key, trusted_keys
from qwen_pipeline.errors import CheckFailed, InputRefused
from qwen_pipeline.lineage.pointers import History, judge, move
from qwen_pipeline.lineage.sign import load_key
from qwen_pipeline.lineage.verification.envelopes import SigningKey
from qwen_pipeline.lineage.verification.records import read_record
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.releases.gates import APPROVED, NOT_WORSE, STANDS, approved, not_worse, verdict_stands
from qwen_pipeline.releases.targets.deliver import Delivery, deliver
from qwen_pipeline.releases.versions import product_history, release_paths, require_release
from qwen_pipeline.reports import CheckReport, dump_reports


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """The outcome of a promotion or a rollback.

    Attributes:
        release: The release that was examined.
        digest: Its content digest.
        before: The release that was in production; None if none was.
        moved: Whether ``production`` leads to it since just now.
        reports: The checks of the release.
        deliveries: The places that it was delivered to.
    """

    product: str
    release: Path
    digest: str
    before: Path | None
    moved: bool
    reports: Sequence[CheckReport]
    deliveries: Sequence[Delivery] = ()

    @property
    def in_production(self) -> bool:
        return self.moved or self.before == self.release

    def to_json(self) -> dict[str, Any]:
        return {
            "product": self.product,
            "release": str(self.release),
            "digest": self.digest,
            "before": str(self.before) if self.before else None,
            "moved": self.moved,
            "in_production": self.in_production,
            "checks": dump_reports(self.reports),
            "deliveries": [delivery.to_json() for delivery in self.deliveries],
        }


def offer(settings: Settings, product: str, release: Path) -> bool:
    """Point ``candidate`` at a release that was made, or requested again; return whether it moved."""
    reason = "The release that was made or requested last."
    return move(settings.store_root, product, "candidate", release, reason=reason, key=signing_key(settings))


def approve(
    settings: Settings,
    product: str,
    *,
    reason: str,
    release: str | None = None,
    by: str = "",
    key: Path | None = None,
    revoke: bool = False,
) -> Path:
    """State that a release, by default the candidate, is approved for production, or revoked; return it.

    Args:
        settings: The settings.
        product: Name of the fine-tune, or ``<fine-tune>@<recipe>``.
        reason: Why; audits show it.
        release: Digits of its key or content digest.
        by: Name of the person; by default the account.
        key: The person's P-256 private key in PEM; by default that of the settings.
        revoke: Whether it is revoked.

    Raises:
        InputRefused: There is no such release, the reason is empty, or the key is not trusted.
        CheckpointRefused: The log of the store was changed, or the release has no manifest.
    """
    stated = product_history(settings, product)
    path = require_release(settings, stated, release)
    signer = _signer(settings, key)
    judge(settings.store_root, product, path, approved=not revoke, reason=require_reason(reason), by=by, key=signer)
    return path


def promote(
    settings: Settings,
    product: str,
    *,
    release: str | None = None,
    reason: str = "",
    by: str = "",
    key: Path | None = None,
    accept_regression: bool = False,
    observe: Observe = unobserved,
) -> Promotion:
    """Point ``production`` at a release, by default the candidate, after it was delivered to every target.

    Args:
        settings: The settings.
        product: Name of the fine-tune, or ``<fine-tune>@<recipe>``.
        release: Digits of its key or content digest.
        reason: Why; audits show it.
        by: Name of the person; by default the account.
        key: The person's P-256 private key in PEM; by default that of the settings.
        accept_regression: Whether it may be worse than the release in production; needs a reason.
        observe: Called with the bytes delivered.

    Raises:
        CheckFailed: A byte differs, it was revoked or recalled, it waits for approval, it is worse, or what is at a
            target is not the release.
        InputRefused: There is no such release, a reason is missing, or the key is not trusted.
        CheckpointRefused: The log of the store was changed.
        EnvironmentFault: A target cannot be reached or written.
    """
    if accept_regression:
        require_reason(reason)
    stated, signer = product_history(settings, product), _signer(settings, key)
    path = require_release(settings, stated, release)
    reports = examine(settings, stated, path)
    waived = {NOT_WORSE.name} if accept_regression else set[str]()
    _require_gates(product, path, [each for each in reports if each.name not in waived])
    return _point(settings, stated, path, reports, reason=reason or "Promoted.", by=by, key=signer, observe=observe)


def advance(settings: Settings, product: str, *, observe: Observe = unobserved) -> Promotion:
    """Point ``production`` at the candidate if every check of it passed; otherwise leave it where it is.

    The comparison with the release in production must have been made, unless there is none.
    """
    stated = product_history(settings, product)
    path = require_release(settings, stated, None)
    reports, before = examine(settings, stated, path), stated.target("production")
    if any(not each.passed and not (each.skipped and before is None) for each in reports):
        digest = read_record(path).step.content_digest
        return Promotion(product=product, release=path, digest=digest, before=before, moved=False, reports=reports)
    reason = "It passed every check." if settings.release.promote == "automatic" else "Materialized by hand."
    return _point(settings, stated, path, reports, reason=reason, key=signing_key(settings), observe=observe)


def rollback(
    settings: Settings,
    product: str,
    *,
    reason: str,
    to: str | None = None,
    by: str = "",
    key: Path | None = None,
    observe: Observe = unobserved,
) -> Promotion:
    """Move ``production`` back to an earlier release, and revoke the one that it points at now.

    By default it is the last earlier release in production whose verdict stands and that was not revoked or recalled.
    No byte is copied, except to a target that lost it.

    Args:
        settings: The settings.
        product: Name of the fine-tune, or ``<fine-tune>@<recipe>``.
        reason: Why; audits show it.
        to: Digits of the key or content digest of the release to go back to.
        by: Name of the person; by default the account.
        key: The person's P-256 private key in PEM; by default that of the settings.
        observe: Called with the bytes delivered.

    Raises:
        InputRefused: No release is in production, there is none to go back to, the reason is empty, or the key is not
            trusted.
        CheckFailed: The release that ``to`` names cannot be served, or what is at a target is not the release.
        CheckpointRefused: The log of the store was changed.
        EnvironmentFault: A target cannot be reached or written.
    """
    require_reason(reason)
    stated, signer = product_history(settings, product), _signer(settings, key)
    now = stated.target("production")
    if now is None:
        raise InputRefused(
            f"No release of {product} is in production.", remedy=f"Promote one: qwen-pipeline promote {product}"
        )
    path, reports = _earlier(settings, stated, now, to)
    if (verdict := stated.verdict(now)) is None or verdict.event != "revoked":
        judge(settings.store_root, product, now, approved=False, reason=reason, by=by, key=signer)
    return _point(settings, stated, path, reports, reason=reason, by=by, key=signer, observe=observe)


def examine(settings: Settings, stated: History, release: Path) -> list[CheckReport]:
    """Return the reports on whether a release may be promoted; every byte of it is read."""
    return [
        verdict_stands(settings.store_root, release, trusted_keys(settings)),
        approved(stated, release, required=settings.release.approval == "required"),
        not_worse(stated.target("production"), release),
    ]


def require_reason(reason: str) -> str:
    """Return a reason.

    Raises:
        InputRefused: It is empty.
    """
    if not reason.strip():
        raise InputRefused("No reason was given.", remedy='Pass --reason "..."; audits show it.')
    return reason


def _earlier(settings: Settings, stated: History, now: Path, to: str | None) -> tuple[Path, Sequence[CheckReport]]:
    """Return the release to go back to, and its checks."""
    if to:
        path = require_release(settings, stated, to)
        if path == now:
            raise InputRefused(f"{now.name} is in production already.", remedy="Name another release with --to.")
        reports = _standing(settings, stated, path)
        _require_gates(stated.product, path, reports)
        return path, reports
    earlier = [path for path in stated.releases("production") if path != now]
    faults: list[str] = []
    for path in earlier:
        reports = _standing(settings, stated, path)
        if all(each.passed for each in reports):
            return path, reports
        faults += [f"{path.name}: {each.detail}" for each in reports if not each.passed]
    others = [path.name for path in release_paths(settings, stated) if path not in (*earlier, now)]
    raise InputRefused(
        f"{stated.product} has no earlier release in production to go back to. {' '.join(faults)}".strip(),
        remedy=f"Name one that was not in production with --to: {', '.join(others) or 'there is none'}.",
    )


def _standing(settings: Settings, stated: History, path: Path) -> list[CheckReport]:
    """Return the checks of a release to go back to: it was in production, so it needs no other approval."""
    was_in_production = path in stated.releases("production")
    required = settings.release.approval == "required" and not was_in_production
    return [
        verdict_stands(settings.store_root, path, trusted_keys(settings)),
        approved(stated, path, required=required),
    ]


def _require_gates(product: str, path: Path, reports: Sequence[CheckReport]) -> None:
    for report in reports:
        if not report.passed and not report.skipped:
            raise CheckFailed(
                f"{path.name} of {product} is not promoted, {report.name}: {report.detail}",
                remedy=_REMEDIES[report.name],
            )


_REMEDIES = {
    STANDS.name: "Promote another release; of one that was not recalled, delete the directory and publish again.",
    APPROVED.name: "Approve it, or promote another release: qwen-pipeline releases shows them.",
    NOT_WORSE.name: 'Compare both reports; to promote it all the same: --accept-regression --reason "...".',
}


def _signer(settings: Settings, key: Path | None) -> SigningKey | None:
    """Return a person's key, or that of the settings.

    Raises:
        InputRefused: It is not among the keys that the settings trust, so that nothing signed with it would count.
    """
    if key is None:
        return signing_key(settings)
    signer, trusted = load_key(key), trusted_keys(settings)
    if trusted is not None and signer.public.keyid not in [each.keyid for each in trusted]:
        raise InputRefused(
            f"The settings do not trust the key {key} ({signer.public.keyid[:16]}).",
            remedy="Add its public key to trusted in [signing].",
        )
    return signer


def _point(
    settings: Settings,
    stated: History,
    path: Path,
    reports: Sequence[CheckReport],
    *,
    reason: str,
    key: SigningKey | None,
    by: str = "",
    observe: Observe,
) -> Promotion:
    """Deliver a release to every target, lead ``production`` to it, and then the pointers of the targets."""
    product, digest = stated.product, read_record(path).step.content_digest
    deliveries = deliver(settings.release.targets, product, path, observe=observe)
    moved = move(settings.store_root, product, "production", path, reason=reason, by=by, key=key)
    return Promotion(
        product=product,
        release=path,
        digest=digest,
        before=stated.target("production"),
        moved=moved,
        reports=reports,
        deliveries=[delivery.point() for delivery in deliveries],
    )
