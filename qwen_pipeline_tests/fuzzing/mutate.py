"""Random damage to documents, bytes, files and directories, as people and tools do it.

It is drawn from a :class:`random.Random`, which takes a hundredth of the time of Hypothesis' strategies.
"""

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

Edits = Sequence[tuple[str, bytes | None]]
"""New contents of files by their names; None removes a file."""
VALUES: Sequence[Any] = (
    None, True, False, 0, 1, -1, 2, 7, 64, 2**31, 2**70, -0.5, 0.5, 1e308, float("nan"), float("inf"), "", "x", "0",
    "\ud83d", "../../x", "bfloat16", "qwen3", [], [None], ["a"], [1, 2], [[]], [{}], {}, {"a": 1}, {"type": "x"},
    {"0": None}, 10**400, "a" * 5000, "\x00", "\x1b", "9" * 5000, {"a": {"b": [{}]}}, [[[[[]]]]], "1e308",
)  # fmt: skip
TOKENS: Sequence[bytes] = (
    b"\0", b"\xff", b"\xed\xa0\x80", b"\x1b[2J", b"{}", b"[]", b"null", b"true", b"1e999", b"-1", b"0", b"NaN",
    b"18446744073709551616", b'"', b'"\\ud800"', b"\\u0000", b",", b":", b"{", b"}", b"[" * 2000, b"9" * 5000,
    b'"a":1,', b"../", b"\n", b"\r", b"= 1\n", b"[[a]]\n",
)  # fmt: skip


def mutated(data: bytes, random: Random) -> bytes:
    """Return bytes with one to four changes; half of the time, those of a JSON document or header keep it one."""
    if random.random() < 0.5:
        if header := _header(data):
            changed = json.dumps(mutated_document(header, random)).encode()
            return len(changed).to_bytes(8, "little") + changed + data[8 + int.from_bytes(data[:8], "little") :]
        try:
            document = json.loads(data)
        except ValueError:
            pass
        else:
            return json.dumps(mutated_document(document, random)).encode()
    return damaged(data, random)


def _header(data: bytes) -> dict[str, Any]:
    """Return the header of a safetensors file; empty if the bytes are none."""
    end = 8 + int.from_bytes(data[:8], "little")
    if data[8:9] != b"{" or end > len(data):
        return {}
    try:
        return json.loads(data[8:end])
    except ValueError:
        return {}


def mutated_document(document: Any, random: Random) -> Any:
    """Return a JSON document with one to three values replaced, removed or added."""
    document = copy.deepcopy(document)
    for _ in range(random.randint(1, 3)):
        document = _replaced(document, random)
    return document


def damaged(data: bytes, random: Random) -> bytes:
    """Return bytes with one to four changes."""
    for _ in range(random.randint(1, 4)):
        data = random.choice(_CHANGES)(data, random)
    return data


def _replaced(node: Any, random: Random) -> Any:
    """Replace, remove or add something at a random place of a document."""
    if isinstance(node, (dict, list)) and node and random.random() < 0.8:
        key = random.choice(list(node) if isinstance(node, dict) else range(len(node)))
        choice = random.random()
        if choice < 0.1:
            node.pop(key)
        elif choice < 0.2 and isinstance(node, dict):
            node[random.choice(_KEYS)] = node[key]
        else:
            node[key] = _replaced(node[key], random)
        return node
    return copy.deepcopy(random.choice(VALUES))


def _flip(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + bytes([random.randrange(256)]) + data[at + 1 :]


def _delete(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + data[at + random.randint(1, 40) :]


def _repeat(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[: at + random.randint(1, 60)] + data[at:]


def _insert(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + random.choice(TOKENS) + data[at:]


def _cut(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _encode(data: bytes, random: Random) -> bytes:
    return random.choice((b"", b"\xef\xbb\xbf" + data, data.decode("utf-8", "replace").encode("utf-16")))


_KEYS = (
    "x", "", "\ud800", "a" * 300, "type", "text_config", "quantization_config",
    f"model.layers.{'9' * 5000}.mlp.up_proj.weight",
    "model.layers.1.self_attn.qkv_proj.weight", "model.layers.00.input_layernorm.weight",
)  # fmt: skip
_CHANGES: Sequence[Callable[[bytes, Random], bytes]] = (
    *(2 * (_flip, _insert, _delete)), *(2 * (_repeat, _cut)), _encode
)  # fmt: skip


def lines_of(records: Sequence[Any], random: Random) -> bytes:
    """Return a file of mutated records, JSON lines or an array, some of it damaged."""
    documents = [mutated_document(random.choice(records), random) for _ in range(random.randint(0, 6))]
    if random.random() < 0.3:
        array = json.dumps(documents, indent=1).encode()
        return damaged(array, random) if random.random() < 0.5 else array
    lines = [json.dumps(document).encode() for document in documents]
    return b"\n".join(damaged(line, random) if random.random() < 0.3 else line for line in lines)


def file_edits(root: Path, names: Sequence[str], random: Random) -> Edits:
    """Return new contents of one or two of the named files of a directory."""
    chosen = random.sample(list(names), random.randint(1, min(2, len(names))))
    return [(name, None if random.random() < 0.2 else mutated((root / name).read_bytes(), random)) for name in chosen]


def edited_copy(source: Path, target: Path, edits: Edits) -> Path:
    """Copy a directory with other contents of some files."""
    shutil.copytree(source, target)
    for name, content in edits:
        (target / name).unlink(missing_ok=True)
        if content is not None:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(content)
    return target
