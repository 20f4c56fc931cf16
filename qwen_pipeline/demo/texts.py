"""The demo's texts for training, calibration and evaluation, from the language reference that CPython ships."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_pipeline.checkpoint.files import write_bytes

HELD_OUT_EVERY = 6
"""Every sixth topic is held out from training and calibration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Three JSONL files: ``training`` and ``calibration`` share topics, ``held_out`` has topics of its own."""

    training: Path
    calibration: Path
    held_out: Path


def write_texts(root: Path) -> Texts:
    """Write the three files below ``root``; the same version of CPython gives the same bytes.

    Calibration mixes plain text with questions and answers in the chat format, since the model will be used with both.
    """
    from pydoc_data.topics import topics

    names = sorted({text: name for name, text in sorted(topics.items())}.values())  # some texts have several names
    held_out = names[::HELD_OUT_EVERY]
    seen = [name for name in names if name not in held_out]
    texts = Texts(
        training=root / "training.jsonl", calibration=root / "calibration.jsonl", held_out=root / "held_out.jsonl"
    )
    _write(texts.training, [_chat(name, topics[name]) for name in seen])
    _write(texts.calibration, [{"text": topics[name]} for name in seen] + [_chat(n, topics[n]) for n in seen])
    _write(texts.held_out, [{"text": topics[name]} for name in held_out])
    return texts


def _chat(name: str, text: str) -> dict[str, list[dict[str, str]]]:
    question = f"Explain {name.replace('-', ' ')} in Python."
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": text}]}


def _write(path: Path, lines: Sequence[Mapping[str, object]]) -> None:
    write_bytes(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
