"""Templates and tokenizers that loop, fill memory or break out are refused by name, and their process ends."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.text.bounded_tokenizer import BoundedTokenizer
from qwen_pipeline.text.records import BadRecord, Conversation, PlainText
from qwen_pipeline.text.tokenizer_service import LoadedTokenizer
from qwen_pipeline.text.tokenizers import MAX_ADDED
from qwen_pipeline.workers.bounded import Limits
from qwen_pipeline_tests.tiny import tiny_tokenizer

FEW = Limits(seconds=0.5, memory_bytes=1_000_000_000)
TALK = Conversation(messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}])
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"


def saved(root: Path, template: str | None = None, **config: Any) -> Path:
    tiny_tokenizer().save_pretrained(root)
    file = root / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if template is not None:
        (root / "chat_template.jinja").write_text(template)
    return root


def test_answers_are_those_of_the_tokenizer_itself(tmp_path: Path) -> None:
    inside, outside = BoundedTokenizer(saved(tmp_path)), LoadedTokenizer(tiny_tokenizer())
    for record in (TALK, PlainText(text="Some words. \u2028 ü")):
        assert inside.encode(record, where="here") == outside.encode(record, where="here")
    assert inside.encode_prompt("Hi") == outside.encode_prompt("Hi")
    assert inside.encode_text("a", add_special_tokens=True) == outside.encode_text("a", add_special_tokens=True)
    assert inside.decode([0, 9, 256, 80]) == outside.decode([0, 9, 256, 80])
    assert inside.pad_token == outside.pad_token == 256
    with pytest.raises(BadRecord, match=r"half of a surrogate pair: '.*half \\ud83d'"):
        inside.encode(PlainText(text="half \ud83d"), where="here")
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(BadRecord, match="nested too deeply"):
        inside.encode(Conversation(messages=[{"role": "user", "content": "Hi", "more": deep}]), where="here")


DOUBLING = "{% set n = namespace(a='a' * 99) %}{% for i in range(64) %}{% set n.a = n.a ~ n.a %}{% endfor %}{{ n.a }}"


@pytest.mark.parametrize(
    ("template", "refused", "words"),
    [
        (LOOP + "{% endfor %}" * 3, InputRefused, "here needs more than 0.5 seconds of processor time in the chat"),
        ("{{ 'a' * 10 ** 10 }}", InputRefused, "here needs more than 1.0 GB of memory"),
        (DOUBLING, InputRefused, "here needs more than"),
        ("{{ 'a' * 10 ** 9 }}", InputRefused, "here needs more than"),
        ("{{ messages[0].content * 10 ** 7 }}", BadRecord, "makes a text that is far longer: 20,000,000 characters"),
        ("{{ ''.__class__.__mro__ }}", BadRecord, "chat template refuses it: access to attribute '__class__'"),
        ("{% include '/etc/passwd' %}", BadRecord, "chat template refuses it: no loader"),
        ("{{ range(10**9) | list }}", BadRecord, "chat template refuses it: Range too big"),
        ("{{ open('/etc/passwd') }}", BadRecord, "chat template refuses it: 'open' is undefined"),
        ("{{ [[[" * 3000, BadRecord, "refuses it: maximum recursion depth exceeded"),
    ],
)
def test_a_hostile_template_is_refused(template: str, refused: type[Exception], words: str, tmp_path: Path) -> None:
    tokenizer = BoundedTokenizer(saved(tmp_path, template), FEW)
    with pytest.raises(refused) as refusal:
        tokenizer.encode(TALK, where="here")
    assert words in str(refusal.value)


def with_added(count: int) -> Callable[[Path], None]:
    def add(root: Path) -> None:
        file = root / "tokenizer.json"
        content = json.loads(file.read_text())
        one = content["added_tokens"][0]
        content["added_tokens"] = [{**one, "id": 300 + n, "content": f"<{n}>"} for n in range(count)]
        file.write_text(json.dumps(content))

    return add


def with_template(length: int) -> Callable[[Path], object]:
    return lambda root: (root / "chat_template.jinja").write_text("{{ a }}" * (length // 7))


def backtracking(root: Path) -> None:
    file = root / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": "(a|aa|a?a)+$(?<=b)"}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (with_added(MAX_ADDED + 1), f"tokenizer.json has {MAX_ADDED + 1:,} added tokens, but at most {MAX_ADDED:,}"),
        (with_template(7_000_000), "has 7,000,000 characters, but at most 1,000,000 are read"),
        (lambda root: os.truncate(root / "tokenizer.json", 40_000_000_000), "has 40,000,000,000 bytes"),
    ],
)
def test_a_hostile_tokenizer_is_refused(damage: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    damage(saved(tmp_path))
    with pytest.raises(InputRefused) as refusal:
        BoundedTokenizer(tmp_path)
    assert words in str(refusal.value)
    assert refusal.value.remedy
