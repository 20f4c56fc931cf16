"""Files of records: JSON lines, a JSON array, or a text that is one record.

Lines are read when they are asked for, since a file may be larger than the memory.
"""

import codecs
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, cast

from qwen_pipeline.checkpoint.files import parse_json
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.text.lines import MAX_LINE_BYTES, Lines
from qwen_pipeline.text.records import FORMAT, BadRecord, EmptyRecord, parse_record

PARQUET = ".parquet"
SUFFIXES = (".jsonl", ".json", ".txt", PARQUET)
"""Suffixes of files that hold text."""
MAX_DOCUMENT_BYTES = 250_000_000
"""The longest JSON array that is read; lines have no such limit."""

_WIDE = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
         codecs.BOM_UTF16_BE: "UTF-16"}  # fmt: skip
"""Byte order mark -> encoding; UTF-32's begin with UTF-16's."""
_IN_UTF8 = "Save the file in UTF-8, such as with: iconv -f {} -t UTF-8 {} > in-utf-8{}"
_BEGINNING = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRecord:
    """A record of a file, or the reason why it cannot be used.

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


class RecordLines(Sequence[StoredRecord]):
    """The records of a file of JSON lines, each parsed when it is asked for."""

    def __init__(self, file: Path, start: int) -> None:
        self._file = file
        self._lines = Lines(file, start)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        place = f"line {self._lines.number(index)}"
        if (length := self._lines.length(index)) > MAX_LINE_BYTES:
            bad = BadRecord(f"has more than {MAX_LINE_BYTES:,} bytes", f"{length:,}", remedy="Split these records.")
            return StoredRecord(place=place, value=bad)
        return StoredRecord(place=place, value=_parse(self._lines.read(index), self._file))


def load_records(file: Path) -> Sequence[StoredRecord]:
    """Open a file's records. Blank lines are skipped; lines that are not records are kept with the reason.

    A byte order mark is ignored, and Windows' line ends are read as those of Unix.

    Raises:
        InputRefused: The file cannot be read, is not UTF-8, is too long for its kind, or has no records.
    """
    try:
        with file.open("rb") as stream:
            beginning, size = stream.read(_BEGINNING), os.fstat(stream.fileno()).st_size
        _require_utf8(beginning, file)
        mark = len(codecs.BOM_UTF8) if beginning.startswith(codecs.BOM_UTF8) else 0
        if file.suffix == ".txt":
            return [StoredRecord(place="line 1", value={"text": _whole_text(_read(file, size, mark), file)})]
        first = beginning[mark:].lstrip()[:1]
        records = list(_elements(_read(file, size, mark), file)) if first == b"[" else RecordLines(file, mark)
        if first == b"{" and len(records) > 1 and all(isinstance(each.value, BadRecord) for each in records[:2]):
            records = (
                list(_one_object(_read(file, size, mark), file)) if size <= MAX_DOCUMENT_BYTES else []
            ) or records
        if first == b"{" and len(records) == 1 and not _is_record(value := records[0].value):
            _require_no_records_within(value, file)
    except OSError as error:
        raise InputRefused(f"{file} cannot be read: {error}.", remedy="Pass a readable JSONL or .txt file.") from error
    if not records:
        raise InputRefused(f"{file} holds no records.", remedy=FORMAT)
    return records


def _require_utf8(beginning: bytes, file: Path) -> None:
    encoding = next((name for mark, name in _WIDE.items() if beginning.startswith(mark)), None)
    if encoding or (b"\0" in beginning[:4] and beginning[:4].strip(b"\0")):
        encoding = encoding or "UTF-16"
        raise InputRefused(f"{file} is in {encoding}.", remedy=_IN_UTF8.format(encoding, quote(str(file)), file.suffix))


def _read(file: Path, size: int, start: int) -> bytes:
    """Read a whole document."""
    is_text = file.suffix == ".txt"
    if size > (most := MAX_LINE_BYTES if is_text else MAX_DOCUMENT_BYTES):
        lines = "jq -R -c '{text: .}'" if is_text else "jq -c '.[]'"
        raise InputRefused(
            f"{file} is one {'text' if is_text else 'array'} of {size:,} bytes, but at most {most:,} are read at once.",
            remedy=f"Write its records one per line: {lines} {quote(str(file))} > records.jsonl",
        )
    return file.read_bytes()[start:].replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _whole_text(content: bytes, file: Path) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputRefused(
            f"{file} is not UTF-8: {error}.", remedy=_IN_UTF8.format("ENCODING", quote(str(file)), file.suffix)
        ) from error


def _parse(line: bytes, file: Path) -> Mapping[str, Any] | BadRecord:
    try:
        return _as_fields(parse_json(line, half_surrogates=True))
    except UnicodeDecodeError as error:
        return BadRecord("is not UTF-8", str(error), remedy=_IN_UTF8.format("ENCODING", quote(str(file)), file.suffix))
    except ValueError as error:
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
        value: Any = parse_json(content, half_surrogates=True)
    except ValueError:
        return
    _require_no_records_within(value, file)
    yield StoredRecord(place="record 1", value=value)


def _is_record(value: Mapping[str, Any] | BadRecord) -> bool:
    """Return whether an object has the form of a record, which may be empty."""
    if isinstance(value, BadRecord):
        return False
    try:
        parse_record(value)
    except EmptyRecord:
        return True
    except BadRecord:
        return False
    return True


def _require_no_records_within(value: Mapping[str, Any] | BadRecord, file: Path) -> None:
    """Require that an object that is a whole file has no lists of records in place of being one."""
    fields = {} if isinstance(value, BadRecord) else value
    lists = [name for name, part in fields.items() if isinstance(part, list) and part and isinstance(part[0], dict)]
    if lists and not {"messages", "conversations", "chosen", "completion"} & set(lists):
        path = f'.["{lists[0]}"][]'
        raise InputRefused(
            f"{file} is one JSON object, with records in {', '.join(map(ascii, lists))}.",
            remedy=f"Write them one per line: jq -c {quote(path)} {quote(str(file))} > records.jsonl",
        )


def _decoded(content: bytes, file: Path) -> object:
    try:
        return parse_json(content, half_surrogates=True)
    except ValueError as error:
        raise InputRefused(
            f"{file} begins as a JSON array, but is not valid JSON: {error}.", remedy=f"Correct the array. {FORMAT}"
        ) from error
