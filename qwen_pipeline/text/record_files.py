"""Files of records: JSON lines, a JSON array, or a text that is one record."""

import codecs
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, cast

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.text.records import FORMAT, BadRecord

PARQUET = ".parquet"
SUFFIXES = (".jsonl", ".json", ".txt", PARQUET)
"""Suffixes of files that hold text."""

_WIDE = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
         codecs.BOM_UTF16_BE: "UTF-16"}  # fmt: skip
"""Byte order mark -> encoding; UTF-32's begin with UTF-16's."""
_IN_UTF8 = "Save the file in UTF-8, such as with: iconv -f {} -t UTF-8 {} > in-utf-8{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRecord:
    """A record of a file, or the reason why it is none.

    Attributes:
        place: Its line or its position in the array, from 1: ``line 7``.
    """

    place: str
    value: Mapping[str, Any] | BadRecord

    @property
    def fields(self) -> Mapping[str, Any]:
        """The record's fields.

        Raises:
            BadRecord: It has none.
        """
        if isinstance(self.value, BadRecord):
            raise self.value
        return self.value


def load_records(file: Path) -> list[StoredRecord]:
    """Read a file's records. Blank lines are skipped; lines that are not records are kept with the reason.

    A byte order mark is ignored, and Windows' line ends are read as those of Unix.

    Raises:
        InputRefused: The file cannot be read, is not UTF-8, or has no records.
    """
    content = _read(file)
    if file.suffix == ".txt":
        return [StoredRecord(place="line 1", value={"text": _whole_text(content, file)})]
    start = content.lstrip()[:1]
    records = list(_elements(content, file) if start == b"[" else _lines(content))
    if start == b"{" and len(records) > 1 and all(isinstance(each.value, BadRecord) for each in records[:2]):
        records = list(_one_object(content, file)) or records
    if not records:
        raise InputRefused(f"{file} holds no records.", remedy=FORMAT)
    return records


def _read(file: Path) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputRefused(f"{file} cannot be read: {error}.", remedy="Pass a readable JSONL or .txt file.") from error
    encoding = next((name for mark, name in _WIDE.items() if content.startswith(mark)), None)
    if encoding or (b"\0" in content[:4] and content[:4].strip(b"\0")):
        encoding = encoding or "UTF-16"
        raise InputRefused(f"{file} is in {encoding}.", remedy=_IN_UTF8.format(encoding, quote(str(file)), file.suffix))
    return content.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _whole_text(content: bytes, file: Path) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputRefused(
            f"{file} is not UTF-8: {error}.", remedy=_IN_UTF8.format("ENCODING", quote(str(file)), file.suffix)
        ) from error


def _lines(content: bytes) -> Iterator[StoredRecord]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield StoredRecord(place=f"line {number}", value=_parse(line))


def _parse(line: bytes) -> Mapping[str, Any] | BadRecord:
    try:
        return _as_fields(json.loads(line.decode()))
    except UnicodeDecodeError as error:
        return BadRecord("is not UTF-8", str(error), remedy=_IN_UTF8.format("ENCODING", "FILE", ""))
    except (ValueError, RecursionError) as error:
        return BadRecord("is not valid JSON", f"{error}: {line[:60].decode(errors='replace')!a}", remedy=FORMAT)


def _as_fields(value: object) -> Mapping[str, Any] | BadRecord:
    if isinstance(value, dict):
        return cast("dict[str, Any]", value)
    return BadRecord("is not a JSON object", ascii(value)[:80], remedy=FORMAT)


def _elements(content: bytes, file: Path) -> Iterator[StoredRecord]:
    """Read an array of records; a file of lines that are arrays is no such array."""
    for number, element in enumerate(cast("list[object]", _decoded(content, file)), start=1):
        yield StoredRecord(place=f"record {number}", value=_as_fields(element))


def _one_object(content: bytes, file: Path) -> Iterator[StoredRecord]:
    """Read a file that is one object over several lines, if it is one.

    Raises:
        InputRefused: The object has lists of records instead of being one.
    """
    try:
        value: Any = json.loads(content)
    except (ValueError, RecursionError):
        return
    if lists := [name for name, part in value.items() if isinstance(part, list) and part and isinstance(part[0], dict)]:
        known = {"messages", "conversations", "chosen", "completion"}
        if not known & set(lists):
            path = f'.["{lists[0]}"][]'
            raise InputRefused(
                f"{file} is one JSON object, with records in {', '.join(map(ascii, lists))}.",
                remedy=f"Write them one per line: jq -c {quote(path)} {quote(str(file))} > records.jsonl",
            )
    yield StoredRecord(place="record 1", value=value)


def _decoded(content: bytes, file: Path) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputRefused(
            f"{file} begins as a JSON array, but is not valid JSON: {error}.", remedy=f"Correct the array. {FORMAT}"
        ) from error
