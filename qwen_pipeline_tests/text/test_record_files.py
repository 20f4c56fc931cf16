"""Files of records as editors, exporters and scrapers write them."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.text import lines, record_files
from qwen_pipeline.text.record_files import load_records
from qwen_pipeline.text.records import BadRecord

RECORDS: list[dict[str, Any]] = [{"text": "Grüße \u2028 \u0085"}, {"text": "b", "score": 1}]
LINES = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS).encode()


def read(root: Path, content: bytes | str, name: str = "file.jsonl") -> list[dict[str, Any] | str]:
    """Return the records of a file, or the reasons why lines are none, with their places."""
    file = root / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return [
        f"{each.place}: {each.value}" if isinstance(each.value, BadRecord) else dict(each.value)
        for each in load_records(file)
    ]


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        b"\xef\xbb\xbf" + LINES,
        LINES.replace(b"\n", b"\r\n") + b"\r\n",
        LINES.replace(b"\n", b"\n\n \n"),
        json.dumps(RECORDS).encode(),
        json.dumps(RECORDS, indent=2).encode(),
        b"\xef\xbb\xbf\r\n " + json.dumps(RECORDS, indent=1, ensure_ascii=False).encode(),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a"])
def test_the_same_records_in_other_files(content: bytes, name: str, tmp_path: Path) -> None:
    assert read(tmp_path, content, name) == RECORDS


def test_one_object_over_several_lines_is_a_record(tmp_path: Path) -> None:
    talk = {"messages": [{"role": "user", "content": "Hi"}]}
    assert read(tmp_path, json.dumps(talk, indent=2)) == [talk]
    with pytest.raises(InputRefused, match=r"one JSON object, with records in 'train', 'test'") as refused:
        read(tmp_path, json.dumps({"train": [talk], "test": [talk], "version": 2}, indent=2))
    assert """jq -c '.["train"][]'""" in refused.value.remedy


def test_one_object_on_one_line_is_a_record_or_is_refused(tmp_path: Path) -> None:
    talk = {"messages": [{"role": "user", "content": "Hi"}]}
    for record in (talk, {"text": "a", "meta": [{"b": 1}]}, {"text": "", "meta": [{"b": 1}]}, {"other": [1]}):
        assert read(tmp_path, json.dumps(record)) == [record]
    with pytest.raises(InputRefused, match=r"one JSON object, with records in 'data'") as refused:
        read(tmp_path, json.dumps({"version": "1", "data": [talk, talk]}), "a b.json")
    if shutil.which("jq"):
        subprocess.run(refused.value.remedy.partition(": ")[2], shell=True, cwd=tmp_path, check=True)
        assert read(tmp_path, (tmp_path / "records.jsonl").read_bytes()) == [talk, talk]


def test_the_command_that_converts_an_encoding_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "a b.jsonl"
    file.write_bytes('{"text": "Grüße"}'.encode("latin-1"))
    bad = load_records(file)[0].value
    assert isinstance(bad, BadRecord)
    command = bad.remedy.partition(": ")[2].replace("ENCODING", "LATIN1")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert [each.fields for each in load_records(tmp_path / "in-utf-8.jsonl")] == [{"text": "Grüße"}]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "cut', "line 2: is not valid JSON: Unterminated string"),
        ("// end", "line 2: is not valid JSON"),
        ('"text"', "line 2: is not a JSON object: 'text'"),
        ("3", "line 2: is not a JSON object: 3"),
        ("[" * 100_000, "line 2: is not valid JSON: it is nested too deeply"),
        ("1" * 5000, "line 2: is not valid JSON"),
        (b'{"text": "Gr\xfc\xdfe"}', "line 2: is not UTF-8"),
        ('{"text": "\x00"}', "line 2: is not valid JSON: Invalid control character"),
    ],
)
def test_a_line_that_is_no_record_is_kept_with_the_reason(line: bytes | str, words: str, tmp_path: Path) -> None:
    line = line.encode() if isinstance(line, str) else line
    first, second, third = read(tmp_path, b'{"text": "a"}\n' + line + b'\n{"text": "c", "score": NaN}')
    assert (first, isinstance(third, dict)) == ({"text": "a"}, True)
    assert str(second).startswith(words)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_other_encodings_are_refused_with_a_command(encoding: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="is in UTF-") as refused:
        read(tmp_path, '{"text": "a"}'.encode(encoding), name)
    assert "iconv -f UTF-" in refused.value.remedy


def test_a_text_file_is_one_record(tmp_path: Path) -> None:
    assert read(tmp_path, b"\xef\xbb\xbfa\r\nb\rc", "a.txt") == [{"text": "a\nb\nc"}]
    assert read(tmp_path, "[", "a.txt") == [{"text": "["}]
    with pytest.raises(InputRefused, match="is not UTF-8"):
        read(tmp_path, b"Gr\xfc\xdfe", "a.txt")


@pytest.mark.parametrize("content", ["", " \n\n", "[]"])
def test_a_file_without_records_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="holds no records"):
        read(tmp_path, content)


def test_an_array_that_is_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="begins as a JSON array, but is not valid JSON"):
        read(tmp_path, json.dumps(RECORDS)[:-3])


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(InputRefused, match="cannot be read"):
            load_records(path)


def test_lines_that_are_too_long_are_named_and_the_others_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_files, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(lines, "_PIECE", 7)
    found = read(tmp_path, b'\r\n\r{"text": "a"}\r\n' + b"x" * 101 + b'\n \r{"text": "c"}')
    assert found == [{"text": "a"}, "line 4: has more than 100 bytes: 101", {"text": "c"}]


def test_files_that_are_no_text_are_refused_at_once(tmp_path: Path) -> None:
    for name, words in (("a.jsonl", "zero bytes from byte"), ("a.txt", "is one text of 40,000,000,014")):
        file = tmp_path / name
        file.write_bytes(b'{"text": "a"}\n')
        os.truncate(file, 40_000_000_014)
        with pytest.raises(InputRefused, match=words):
            load_records(file)
    array = tmp_path / "a.json"
    array.write_bytes(b"[1, 2")
    os.truncate(array, 40_000_000_000)
    with pytest.raises(InputRefused, match="is one array of 40,000,000,000 bytes, but at most 250,000,000"):
        load_records(array)


def test_a_file_that_is_changed_while_it_is_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(LINES)
    records = load_records(file)
    file.write_bytes(LINES[:-5])
    with pytest.raises(InputRefused, match="was changed while it was read"):
        _ = records[0]


def test_a_key_that_is_repeated_makes_a_record_unclear(tmp_path: Path) -> None:
    (found,) = read(tmp_path, '{"text": "a", "text": "b"}')
    assert str(found).startswith("line 1: is not valid JSON: repeated keys 'text'")
