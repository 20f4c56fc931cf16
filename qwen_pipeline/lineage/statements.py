"""Statements in the log of a store: approvals and revocations of releases, moves of pointers, and recalls.

A statement is an in-toto Statement in the detail of a log line: in a signed DSSE envelope if there is a key, as plain
JSON otherwise. It repeats the line before its own, so that it counts at its place in this log alone.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast, get_args

from qwen_pipeline.checkpoint.store import log
from qwen_pipeline.checkpoint.store.canonical import MANIFEST_FILE
from qwen_pipeline.checkpoint.store.log import Entry
from qwen_pipeline.checkpoint.store.origin import origin
from qwen_pipeline.lineage.provenance import CONTENT_DIGEST, LOG_HEAD, SITE
from qwen_pipeline.lineage.verification.envelopes import PublicKey, SigningKey, open_envelope
from qwen_pipeline.lineage.verification.model_signature import STATEMENT
from qwen_pipeline.lineage.verification.records import Record

PREDICATE = f"{SITE}/release-statement/v1"
Event = Literal["approved", "revoked", "pointed"]
EVENTS: tuple[Event, ...] = get_args(Event)
RECALLED = "recalled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """A person's statement about a release.

    Attributes:
        event: ``approved``; ``revoked``: it is not to be served; ``pointed``: a pointer leads to it from now on.
        product: Name of the fine-tune, or ``<fine-tune>@<recipe>``.
        release: ``published/<fine-tune>/<key>``.
        digest: Content digest of the release.
        manifest_sha256: Hex SHA-256 of its manifest.
        pointer: The pointer that moved; empty of other events.
        before: The release that the pointer led to before; empty if there was none.
        reason: In the words of the person.
        by: Name of the person, or of the account.
        through: The command, sensor or job.
        time: ISO 8601 in UTC.
        line: Number of its line in the log.
        keyid: Id of the key that its signature names; empty if it is not signed. Nothing is verified.
        fault: Why it does not count; empty if it does.
    """

    event: Event
    product: str
    release: str
    digest: str
    manifest_sha256: str
    pointer: str = ""
    before: str = ""
    reason: str
    by: str
    through: str
    time: str
    line: int
    keyid: str = ""
    fault: str = ""

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def state(
    store: Path,
    event: Event,
    release: Record,
    *,
    product: str,
    reason: str,
    by: str = "",
    key: SigningKey | None = None,
    **move: str,
) -> None:
    """Append a statement about a release to the log of its store.

    Args:
        store: The store.
        event: What is stated.
        release: The manifest of the release.
        product: Name of the fine-tune, or ``<fine-tune>@<recipe>``.
        reason: In the words of the person.
        by: Name of the person; by default the account.
        key: The key that signs the statement; None: it is not signed.
        move: ``pointer`` and ``before``, of a move.
    """
    name = path_of(release.root)
    sha256 = hashlib.sha256((release.root / MANIFEST_FILE).read_bytes()).hexdigest()
    digests = {"sha256": sha256, CONTENT_DIGEST: release.step.content_digest.removeprefix("sha256:")}
    told = {"event": event, "product": product, **_words(reason, by), **move}
    path = f"{RELEASES}/{product}/{move['pointer']}" if "pointer" in move else name
    log.append_statement(store, event, path, sha256, _detail({"name": name, "digest": digests}, told, key))


def recall(store: Path, digest: str, *, reason: str, by: str = "", key: SigningKey | None = None) -> None:
    """Append the recall of a content digest to the log of a store; it counts for everything that was made from it."""
    subject = {"name": digest, "digest": {CONTENT_DIGEST: digest.removeprefix("sha256:")}}
    told = {"event": RECALLED, **_words(reason, by)}
    log.append_statement(store, RECALLED, digest, "", _detail(subject, told, key))


def reason_of(entry: Entry) -> str:
    """Return the reason of a recall and who gave it; a line of an earlier version holds the reason alone."""
    try:
        told = _payload(entry)["predicate"]
        return f"{told['reason']} ({told['by']})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return entry.detail


def _words(reason: str, by: str) -> dict[str, str]:
    started = origin()
    return {
        "reason": reason,
        "by": by or started.get("user", ""),
        "through": started.get("trigger", ""),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _detail(
    subject: Mapping[str, Any], predicate: Mapping[str, Any], key: SigningKey | None
) -> Callable[[int, str], str]:
    """Return a function of the line before that makes the detail of a line."""

    def detail(lines: int, last: str) -> str:
        statement = {
            "_type": STATEMENT,
            "subject": [subject],
            "predicateType": PREDICATE,
            "predicate": {**predicate, LOG_HEAD: {"lines": lines, "sha256": last}},
        }
        stated = key.envelope(statement, keyid=key.public.keyid) if key else statement
        return json.dumps(stated, ensure_ascii=False)

    return detail


def path_of(release: Path) -> str:
    """Return ``published/<fine-tune>/<key>`` of a release in a store."""
    return "/".join(release.resolve().parts[-3:])


def statements(entries: Sequence[Entry], product: str | None = None) -> list[Statement]:
    """Return the statements of a log about one product, or all of them, the oldest first."""
    found = [_read(entry) for entry in entries if entry.event in EVENTS]
    return [statement for statement in found if product in (None, statement.product)]


def has_signed(entry: Entry, keys: Sequence[PublicKey]) -> bool:
    """Return whether one of the keys signed the statement of a line."""
    try:
        return open_envelope(json.loads(entry.detail), list(keys)) is not None
    except (ValueError, AttributeError):
        return False


def _read(entry: Entry) -> Statement:
    """Return the statement of a line; of one that cannot be read, or does not belong there, only the fault counts."""
    try:
        signatures = json.loads(entry.detail).get("signatures", ())
        return _statement(entry, _payload(entry), str(signatures[0]["keyid"]) if signatures else "")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        return _faulty(entry, f"line {entry.number} of {log.LOG} holds no statement ({error!r})")


def _payload(entry: Entry) -> Mapping[str, Any]:
    value = json.loads(entry.detail)
    return json.loads(base64.b64decode(value["payload"])) if "payload" in value else value


def _statement(entry: Entry, payload: Mapping[str, Any], keyid: str) -> Statement:
    (subject,), told = payload["subject"], payload["predicate"]
    event, pointer = cast("Event", str(told["event"])), str(told.get("pointer", ""))
    release, sha256, product = str(subject["name"]), str(subject["digest"]["sha256"]), str(told["product"])
    path = f"{RELEASES}/{product}/{pointer}" if event == "pointed" else release
    fault = ""
    if payload["predicateType"] != PREDICATE or (event, path, sha256) != (
        entry.event,
        entry.path,
        entry.manifest_sha256,
    ):
        fault = f"line {entry.number} of {log.LOG} holds a statement about something else: {event} {path}"
    elif told[LOG_HEAD] != {"lines": entry.number - 1, "sha256": entry.previous}:
        fault = f"line {entry.number} of {log.LOG} holds a statement that was copied from another place: {event} {path}"
    return Statement(
        event=event,
        product=product,
        release=release,
        digest="sha256:" + str(subject["digest"][CONTENT_DIGEST]),
        manifest_sha256=sha256,
        pointer=pointer,
        before=str(told.get("before", "")),
        reason=str(told["reason"]),
        by=str(told["by"]),
        through=str(told["through"]),
        time=str(told["time"]),
        line=entry.number,
        keyid=keyid,
        fault=fault,
    )


def _faulty(entry: Entry, fault: str) -> Statement:
    parts = entry.path.split("/")
    return Statement(
        event=cast("Event", entry.event),
        product=parts[1] if len(parts) > 1 else "",
        release=entry.path,
        digest="",
        manifest_sha256=entry.manifest_sha256,
        pointer=parts[-1] if entry.event == "pointed" else "",
        reason="",
        by="",
        through="",
        time=entry.time,
        line=entry.number,
        fault=fault,
    )


RELEASES = "releases"
"""The folder of the pointers in a store: ``releases/<product>/<pointer>``."""
