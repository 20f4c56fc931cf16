"""The log of a store: an append-only file of hash-chained lines: what was finished, signed, recalled, stated, dropped.

A line holds the SHA-256 of the line before it, so a line that is changed, removed or inserted breaks the chain. The
last one has no successor: a file beside the log states its number and digest. A signed release holds the digest of the
last line at its time, so a log that was written anew is found too.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from qwen_pipeline.checkpoint.files import parse_json, write_bytes
from qwen_pipeline.checkpoint.store.canonical import MANIFEST_FILE

LOG, HEAD = "log.jsonl", "log.head"
START = "0" * 64
"""In the first line, in place of the digest of the line before."""
_DEPTH = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of a log.

    Attributes:
        number: From 1 on.
        time: ISO 8601 in UTC.
        event: ``finished``, ``materialized``, ``signed``, ``recalled`` or ``dropped``; of a statement about a release
            ``approved``, ``revoked`` or ``pointed``.
        path: ``<stage>/<fine-tune>/<key>`` of the directory, the digest that was recalled, or the pointer that moved.
        manifest_sha256: Hex SHA-256 of the directory's manifest; empty for a recall.
        detail: The signer's key id, the reason of a recall, the rule by which it was dropped, or the statement.
        previous: Hex SHA-256 of the line before, without its end.
        digest: Hex SHA-256 of this line; not part of it.
    """

    number: int
    time: str
    event: str
    path: str
    manifest_sha256: str
    detail: str
    previous: str
    digest: str


def record(store: Path, root: Path, event: str, *, detail: str = "") -> None:
    """Append a line about a finished directory of a store, unless the last such line about it says the same."""
    path = root.resolve().relative_to(store.resolve()).as_posix()
    append(store, event, path, hashlib.sha256((root / MANIFEST_FILE).read_bytes()).hexdigest(), detail)


def is_recorded(store: Path, root: Path) -> bool:
    """Return whether a log has a line about a directory of its store."""
    path = root.resolve().relative_to(store.resolve()).as_posix().encode()
    return (store / LOG).is_file() and path in (store / LOG).read_bytes()


def logged_store(root: Path) -> Path | None:
    """Return the store with a log that a directory ``<store>/<stage>/<fine-tune>/<key>`` lies in; None if in none."""
    parents = root.resolve().parents
    store = parents[_DEPTH - 1] if len(parents) >= _DEPTH else None
    return store if store and (store / LOG).is_file() else None


def append(store: Path, event: str, path: str, manifest_sha256: str, detail: str = "") -> None:
    """Append a line, unless the last one about ``path`` with this event says the same."""
    with _appending(store) as (file, lines):
        stated = [event, path, manifest_sha256, detail]
        earlier = (_said(line) for line in reversed(lines) if path.encode() in line)
        if not next((said == stated for said in earlier if said[:2] == [event, path]), False):
            _write(file, lines, stated)


def append_statement(
    store: Path, event: str, path: str, manifest_sha256: str, state: Callable[[int, str], str]
) -> None:
    """Append a line whose detail is made from the number and the digest of the line that it follows.

    A statement that repeats both cannot be copied to another place of the log, nor into another log.
    """
    with _appending(store) as (file, lines):
        _write(file, lines, [event, path, manifest_sha256, state(len(lines), _last(lines))])


def read_log(store: Path) -> Iterator[Entry]:
    """Yield the entries of a store's log, as they are; a store without a log has none.

    Raises:
        ValueError: A line is not an entry.
    """
    if not (store / LOG).is_file():
        return
    for number, line in enumerate(_lines((store / LOG).read_bytes()), 1):
        try:
            yield Entry(**json.loads(line), digest=hashlib.sha256(line).hexdigest())
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"line {number} is no entry ({error})") from error


def head(store: Path) -> tuple[int, str]:
    """Return the number of lines of a log and the digest of the last one."""
    lines = _lines((store / LOG).read_bytes()) if (store / LOG).is_file() else []
    return len(lines), _last(lines)


def stated_head(store: Path) -> tuple[int, str] | None:
    """Return the number and the digest of the last line, as stated beside the log; None if nothing is.

    A log may be longer: a killed process appends its line first. Then the stated line is still in it.

    Raises:
        ValueError: The file holds something else.
    """
    file = store / HEAD
    if not file.is_file():
        return None
    try:
        stated = parse_json(file.read_bytes())
        return int(stated["lines"]), str(stated["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{HEAD} states no line ({error!r})") from error


@contextmanager
def _appending(store: Path) -> Generator[tuple[BinaryIO, list[bytes]]]:
    """Yield a log and its lines under its lock; what is appended survives a crash.

    The beginning of a line that a killed process or a full disk left is removed first. A stated last line that is not
    in the log is left as it is, so that audits find what was removed.
    """
    with (store / LOG).open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        data = file.read()
        if data and not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)
        lines = _lines(data)
        found, is_whole = len(lines), _is_whole(store, lines)
        yield file, lines
        file.flush()
        os.fsync(file.fileno())
        if is_whole and len(lines) > found:
            write_bytes(store / HEAD, json.dumps({"lines": len(lines), "sha256": _last(lines)}).encode() + b"\n")


def _write(file: BinaryIO, lines: list[bytes], stated: list[str]) -> None:
    entry = {
        "number": len(lines) + 1,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **dict(zip(("event", "path", "manifest_sha256", "detail"), stated, strict=True)),
        "previous": _last(lines),
    }
    lines.append(json.dumps(entry, ensure_ascii=False).encode())
    file.write(lines[-1] + b"\n")


def _is_whole(store: Path, lines: list[bytes]) -> bool:
    """Return whether the stated last line is in the log."""
    try:
        number, digest = stated_head(store) or (0, "")
    except ValueError:
        return False
    return number == 0 or (number <= len(lines) and _last(lines[:number]) == digest)


def _last(lines: list[bytes]) -> str:
    return hashlib.sha256(lines[-1]).hexdigest() if lines else START


def _lines(data: bytes) -> list[bytes]:
    """Return the complete lines; one without its end is still being written, or never was."""
    return data[: data.rfind(b"\n") + 1].splitlines()


def _said(line: bytes) -> list[Any]:
    """Return event, path, manifest and detail of a line; nothing of one that is damaged."""
    try:
        entry = json.loads(line)
        return [entry[name] for name in ("event", "path", "manifest_sha256", "detail")]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
