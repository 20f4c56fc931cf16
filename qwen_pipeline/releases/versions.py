"""The releases of a product and their states, read from the log and from manifests; no weights are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen_pipeline.checkpoint.lazy import MANIFEST, open_checkpoint
from qwen_pipeline.checkpoint.store.destinations import CheckpointStore
from qwen_pipeline.config import Settings
from qwen_pipeline.config.inputs import trusted_keys
from qwen_pipeline.errors import CheckpointRefused, InputRefused
from qwen_pipeline.evaluation.report.model_card import serve_command, serving_degrees
from qwen_pipeline.lineage.library import recorded_steps
from qwen_pipeline.lineage.log_proof import open_log
from qwen_pipeline.lineage.pointers import (
    POINTERS,
    History,
    histories,
    history,
    link_of,
    products,
    require_product,
)
from qwen_pipeline.lineage.verification.records import Record, read_record
from qwen_pipeline.qwen.heads import head_kind
from qwen_pipeline.stages import publish

VersionState = Literal["ready", "waiting", "approved", "revoked", "recalled", "damaged", "gone"]
"""``ready``: it may be promoted, and needs no approval. ``waiting``: for one. ``gone``: its directory was removed."""
MIN_DIGITS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One release of a product.

    Attributes:
        path: Its directory.
        digest: Its content digest; empty if its manifest cannot be read.
        made: ISO 8601 time at which it was made.
        pointers: The pointers that lead to it.
        detail: Who stated it and why, or what is wrong.
    """

    product: str
    path: Path
    digest: str
    made: str
    pointers: Sequence[str]
    state: VersionState
    detail: str

    def to_json(self) -> dict[str, Any]:
        return {
            "product": self.product,
            "path": str(self.path),
            "digest": self.digest,
            "made": self.made,
            "pointers": list(self.pointers),
            "state": self.state,
            "detail": self.detail,
        }


def product_history(settings: Settings, product: str) -> History:
    """Return the statements about a product that count: where releases are signed, those that a trusted key signed."""
    return history(settings.store_root, require_product(product), trusted_keys(settings))


def known_products(settings: Settings) -> list[str]:
    """Return the products with pointers, and those with releases of an earlier version, which had none."""
    store = CheckpointStore(settings.store_root)
    released = {each.key for each in store.products([publish.STAGE])}
    return sorted({*products(store.root), *(key for key in released if store.latest(publish.STAGE, key))})


def versions(settings: Settings, product: str | None = None) -> dict[str, list[Version]]:
    """Return product -> its releases, the last one first; of one product, or of all.

    Raises:
        CheckpointRefused: The log of the store was changed.
    """
    store, required = settings.store_root, settings.release.approval == "required"
    stated, recalled = histories(store, trusted_keys(settings)), open_log(store).recalled
    found: dict[str, list[Version]] = {}
    for name in [require_product(product)] if product else known_products(settings):
        about = stated.get(name) or History(store=store, product=name, statements=())
        paths = release_paths(settings, about)
        found[name] = [_version(about, path, recalled, required=required) for path in paths]
    return found


def release_paths(settings: Settings, stated: History) -> list[Path]:
    """Return the directories of a product's releases, the last one first.

    A product without pointers, of an earlier version, has the one that was requested last.
    """
    if found := stated.releases():
        return found
    latest = CheckpointStore(settings.store_root).latest(publish.STAGE, stated.product)
    return [latest.path] if latest else []


def require_release(settings: Settings, stated: History, text: str | None) -> Path:
    """Return the release that a few digits of its key or content digest name; by default the candidate.

    Raises:
        InputRefused: There is none, or there are several.
    """
    known = release_paths(settings, stated)
    if not known:
        raise InputRefused(
            f"{stated.product} has no release below {settings.store_root}.",
            remedy="Make one: qwen-pipeline run, then qwen-pipeline releases shows it.",
        )
    if text is None:
        return stated.target("candidate") or known[0]
    digits = text.removeprefix("sha256:")
    found = [path for path in known if path.name.startswith(digits) or _digest(path).startswith(f"sha256:{digits}")]
    if len(digits) >= MIN_DIGITS and len(found) == 1:
        return found[0]
    names = ", ".join(f"{path.name} ({_digest(path)[:19]})" for path in known)
    raise InputRefused(
        f"{text} names {len(found)} releases of {stated.product}; it has {names}.",
        remedy=f"Give {MIN_DIGITS} or more digits of a key or of a content digest.",
    )


def serve(settings: Settings, product: str) -> str:
    """Return vLLM's command line for the release in production, by the path of the pointer.

    Raises:
        InputRefused: None is in production, or it is not a language model.
    """
    release = product_history(settings, product).target("production")
    if release is None or not (release / MANIFEST).is_file():
        raise InputRefused(
            f"No release of {product} is in production.", remedy=f"Promote one: qwen-pipeline promote {product}"
        )
    checkpoint = open_checkpoint(release)
    if head_kind(checkpoint) != "language":
        raise InputRefused(
            f"{release} is no language model, and was not served.", remedy=f"Load it as {release / 'README.md'} shows."
        )
    return serve_command(
        str(link_of(settings.store_root, product, "production").absolute()), serving_degrees(checkpoint.config)
    )


def _version(stated: History, path: Path, recalled: dict[str, str], *, required: bool) -> Version:
    pointers = [pointer for pointer in POINTERS if stated.target(pointer) == path]
    digest, made = "", ""
    try:
        record = read_record(path)
        digest, made = record.step.content_digest, str(record.run.get("started", ""))
        state, detail = _state(stated, record, recalled, required=required)
    except CheckpointRefused as refused:
        state, detail = "damaged" if path.is_dir() else "gone", refused.what
    return Version(
        product=stated.product, path=path, digest=digest, made=made, pointers=pointers, state=state, detail=detail
    )


def _state(stated: History, record: Record, recalled: dict[str, str], *, required: bool) -> tuple[VersionState, str]:
    steps = [*recorded_steps(record.root), record.step] if recalled else []
    behind = {digest for step in steps for digest in (step.content_digest, *step.inputs.values())}
    if withdrawn := [f"{digest}: {reason}" for digest, reason in recalled.items() if digest in behind]:
        return "recalled", withdrawn[0]
    verdict = stated.verdict(record.root)
    if verdict:
        return "approved" if verdict.event == "approved" else "revoked", f"{verdict.by}: {verdict.reason}"
    return ("waiting", "for approval") if required else ("ready", "")


def _digest(path: Path) -> str:
    try:
        return read_record(path).step.content_digest
    except CheckpointRefused:
        return ""
