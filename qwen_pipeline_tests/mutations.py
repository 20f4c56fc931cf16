"""Hypothesis strategies that damage JSON documents, texts, files and directories as people and tools do."""

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

VALUES: Sequence[Any] = (
    None, True, False, 0, 1, -1, 2, 7, 64, 2**31, 2**70, -0.5, 0.5, 1e308, float("nan"), float("inf"), "", "x", "0",
    "\ud83d", "../../x", "bfloat16", "qwen3", [], [None], ["a"], [1, 2], [[]], [{}], {}, {"a": 1}, {"type": "x"},
    {"0": None},
)  # fmt: skip
Edit = Callable[[Path], object]


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> Any:
    """Draw a JSON document with one to three values replaced, removed or added."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        document = _mutate(draw, document)
    return document


def _mutate(draw: st.DrawFn, node: Any) -> Any:
    if isinstance(node, (dict, list)) and node and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        if draw(st.integers(0, 5)) == 0:
            node.pop(key)
        elif draw(st.integers(0, 7)) == 0 and isinstance(node, dict):
            node[draw(st.sampled_from(("x", "", "type", "text_config", "quantization_config")))] = node[key]
        else:
            node[key] = _mutate(draw, node[key])
        return node
    return copy.deepcopy(draw(st.sampled_from(VALUES)))


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a file's content cut, with bytes inserted, or with bytes replaced."""
    at = draw(st.integers(0, len(content)))
    kind = draw(st.sampled_from(("cut", "insert", "replace", "empty", "bom", "utf-16")))
    few = draw(st.binary(min_size=1, max_size=4))
    return {
        "cut": content[:at],
        "insert": content[:at] + few + content[at:],
        "replace": content[:at] + few + content[at + len(few) :],
        "empty": b"",
        "bom": b"\xef\xbb\xbf" + content,
        "utf-16": content.decode("utf-8", "replace").encode("utf-16"),
    }[kind]


@st.composite
def file_edits(draw: st.DrawFn, root: Path, names: Sequence[str]) -> list[tuple[str, bytes | None]]:
    """Draw new contents of one or two files of a directory; None removes a file."""
    edits: list[tuple[str, bytes | None]] = []
    for name in draw(st.lists(st.sampled_from(list(names)), min_size=1, max_size=2, unique=True)):
        content = (root / name).read_bytes()
        kinds = ("json", "json", "json", "bytes", "none") if name.endswith(".json") else ("bytes", "bytes", "none")
        kind = draw(st.sampled_from(kinds))
        if kind == "json":
            document = draw(mutated(json.loads(content)))
            edits.append((name, json.dumps(document).encode()))
        else:
            edits.append((name, draw(damaged_bytes(content)) if kind == "bytes" else None))
    return edits


def edited_copy(source: Path, target: Path, edits: Sequence[tuple[str, bytes | None]]) -> Path:
    """Copy a directory with other contents of some files."""
    shutil.copytree(source, target)
    for name, content in edits:
        (target / name).unlink(missing_ok=True)
        if content is not None:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(content)
    return target


def lines_of(records: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """Strategy for files of records: JSON lines, arrays, and lines that are damaged."""
    line = records.map(lambda record: json.dumps(record).encode())
    damaged = line.flatmap(damaged_bytes)
    lines = st.lists(st.one_of(line, line, damaged), max_size=6).map(b"\n".join)
    array = st.lists(records, max_size=4).map(lambda found: json.dumps(found, indent=1).encode())
    return st.one_of(lines, lines, array, array.flatmap(damaged_bytes))
