"""Pointers to the releases of a product: ``candidate``, the last one made, and ``production``, the one to be served.

The log of the store says where a pointer leads; the link ``releases/<product>/<pointer>`` says the same to servers. A
move is stated in the log first. A kill before the link follows is mended by the next move, and named by an audit.
"""

import hashlib
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from qwen_pipeline.checkpoint.files import open_locked, sync_directory
from qwen_pipeline.checkpoint.store.canonical import MANIFEST_FILE
from qwen_pipeline.checkpoint.store.products import product as product_of
from qwen_pipeline.errors import CheckpointRefused, InputRefused
from qwen_pipeline.lineage.log_proof import open_log
from qwen_pipeline.lineage.statements import RELEASES, Statement, has_signed, path_of, state, statements
from qwen_pipeline.lineage.verification.envelopes import PublicKey, SigningKey
from qwen_pipeline.lineage.verification.records import read_record

Pointer = Literal["candidate", "production"]
POINTERS: tuple[Pointer, ...] = get_args(Pointer)
_PRODUCT = re.compile(r"[A-Za-z0-9._-]{1,100}(@[A-Za-z0-9._-]{1,100})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The statements about the releases of a product, the oldest first; those that do not count are left out.

    Attributes:
        store: The store.
        product: Name of the fine-tune, or ``<fine-tune>@<recipe>``.
    """

    store: Path
    product: str
    statements: Sequence[Statement]

    def last_move(self, pointer: str) -> Statement | None:
        """Return the statement that says where a pointer leads."""
        return next((each for each in reversed(self.statements) if each.pointer == pointer), None)

    def target(self, pointer: str) -> Path | None:
        """Return the release that a pointer leads to; None before its first move."""
        move = self.last_move(pointer)
        return self.store / move.release if move else None

    def verdict(self, release: Path) -> Statement | None:
        """Return the last approval or revocation of a release, of the bytes that it has now."""
        manifest = release / MANIFEST_FILE
        sha256 = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else ""
        about = (each for each in reversed(self.statements) if each.event in ("approved", "revoked"))
        return next((each for each in about if each.manifest_sha256 == sha256), None)

    def releases(self, pointer: Pointer | None = None) -> list[Path]:
        """Return the releases that a pointer, or any, has led to: each once, the last one first."""
        led = (each for each in reversed(self.statements) if each.pointer and pointer in (None, each.pointer))
        return [self.store / release for release in dict.fromkeys(each.release for each in led)]


def history(store: Path, product: str, keys: Sequence[PublicKey] | None = None) -> History:
    """Read the statements about a product; see :func:`histories`."""
    return histories(store, keys).get(product) or History(store=store, product=product, statements=())


def histories(store: Path, keys: Sequence[PublicKey] | None = None) -> dict[str, History]:
    """Read the statements about every product.

    Args:
        store: The store.
        keys: Keys of which one must have signed a statement, so that it counts; None: unsigned ones count too.

    Raises:
        CheckpointRefused: The log of the store was changed.
    """
    found = open_log(store)
    if found.fault:
        raise CheckpointRefused(
            f"The log of {store} was changed: {found.fault}.",
            remedy="Restore it from a backup; or move it away, which starts a new one, and audits name the gap.",
        )
    stated: dict[str, list[Statement]] = {}
    for each in statements(found.entries):
        if not each.fault and (keys is None or has_signed(found.entries[each.line - 1], keys)):
            stated.setdefault(each.product, []).append(each)
    return {name: History(store=store, product=name, statements=about) for name, about in stated.items()}


def products(store: Path) -> list[str]:
    """Return the products that have pointers in a store."""
    return sorted(path.name for path in (store / RELEASES).glob("*") if path.is_dir())


def link_of(store: Path, product: str, pointer: Pointer) -> Path:
    """Return the path of a pointer's link, for servers."""
    return store / RELEASES / product / pointer


def pointed(store: Path, product: str, pointer: str) -> str:
    """Return the path below the store that a pointer's link leads to, or any other target; empty without a link."""
    link = store / RELEASES / product / pointer
    return str(link.readlink()).removeprefix("../../") if link.is_symlink() else ""


def pointed_releases(store: Path) -> dict[str, list[str]]:
    """Return ``published/<fine-tune>/<key>`` -> ``<product>/<pointer>`` of each link that leads to it."""
    found: dict[str, list[str]] = {}
    for product in products(store):
        for pointer in POINTERS:
            if release := pointed(store, product, pointer):
                found.setdefault(release, []).append(f"{product}/{pointer}")
    return found


def require_product(product: str) -> str:
    """Return a product's key if it is safe as a directory's name; that of the default recipe is the fine-tune's name.

    Raises:
        InputRefused: It is not.
    """
    if not _PRODUCT.fullmatch(product) or ".." in product or product.startswith((".", "-")):
        raise InputRefused(
            f"{product[:120]!r} is not the name of a fine-tune.",
            remedy="Pass a name that qwen-pipeline releases shows.",
        )
    return product_of(product).key


def move(
    store: Path,
    product: str,
    pointer: Pointer,
    release: Path,
    *,
    reason: str,
    by: str = "",
    key: SigningKey | None = None,
) -> bool:
    """Point a pointer at a release; return False if it points there already, by a statement of the same key.

    Raises:
        CheckpointRefused: The release has no manifest that can be read, or the log of the store was changed.
    """
    product = require_product(product)
    with _moving(store, product) as folder:
        record = read_record(release)
        now = _settled(store, product, folder)
        last = now.last_move(pointer)
        keyid = key.public.keyid if key else ""
        if last and last.release == path_of(release) and (not key or last.keyid == keyid):
            return False
        state(
            store,
            "pointed",
            record,
            product=product,
            reason=reason,
            by=by,
            key=key,
            pointer=pointer,
            before=last.release if last else "",
        )
        _link(folder / pointer, path_of(release))
        return True


def judge(
    store: Path,
    product: str,
    release: Path,
    *,
    approved: bool,
    reason: str,
    by: str = "",
    key: SigningKey | None = None,
) -> None:
    """State that a release is approved, or that it is revoked."""
    product = require_product(product)
    with _moving(store, product):
        event = "approved" if approved else "revoked"
        state(store, event, read_record(release), product=product, reason=reason, by=by, key=key)


@contextmanager
def _moving(store: Path, product: str) -> Generator[Path]:
    """Yield the folder of a product's pointers under its lock."""
    folder = store / RELEASES / product
    folder.mkdir(parents=True, exist_ok=True)
    with open_locked(folder / ".lock", wait=True):
        yield folder


def _settled(store: Path, product: str, folder: Path) -> History:
    """Return the history of a product after its links follow the log, as an interrupted move had left to do."""
    stated = history(store, product)
    for pointer in POINTERS:
        last = stated.last_move(pointer)
        if last and pointed(store, product, pointer) != last.release:
            _link(folder / pointer, last.release)
    return stated


def _link(link: Path, release: str) -> None:
    """Point a link at a release in one rename, and make it survive a crash."""
    scratch = link.with_name(f".{link.name}.new")
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(Path("..", "..", release))
    scratch.replace(link)
    sync_directory(link.parent)
