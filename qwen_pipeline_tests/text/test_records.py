"""Every form of record, as the table of the page on text says."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_pipeline.text.records import BadRecord, EmptyRecord, PlainText, parse_record
from qwen_pipeline_tests import REPOSITORY

PAGE = (REPOSITORY / "docs" / "text.md").read_text()
ROWS: list[tuple[str, str]] = re.findall(
    r"^\| `(.*)` \| (.*) \|$", PAGE.split("forms: begin -->")[1].split("<!-- forms: end")[0], re.MULTILINE
)


def shown(fields: dict[str, Any]) -> str:
    """Return a record in the words of the page."""
    try:
        record = parse_record(fields)
    except EmptyRecord:
        return "empty"
    except BadRecord as bad:
        return f"skipped: {bad.reason}"
    if isinstance(record, PlainText):
        return f'"{record.text}"'
    parts = [f"{name}={value}" for name, value in record.arguments.items()]
    parts += [f"tools: {tool['function']['name']}" for tool in record.tools or ()]
    return " · ".join([*parts, *map(_message, record.messages)]).replace("\n", "⏎")


def _message(message: Any) -> str:
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    called = "".join(f"{call['name']}({json.dumps(call['arguments'])})" for call in calls)
    return f"{message['role']}: {message.get('content') or ''}{called}"


def test_the_page_has_a_row_for_each_form() -> None:
    assert len(ROWS) == 27


@pytest.mark.parametrize(("record", "expected"), ROWS)
def test_a_record_is_read_as_the_page_says(record: str, expected: str) -> None:
    assert shown(json.loads(record)) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": None, "text": "Hi"}, '"Hi"'),
        ({"messages": [], "text": "Hi"}, '"Hi"'),
        ({"messages": [{"role": "user", "content": "A"}], "text": "Hi"}, "user: A"),
        ({"text": "Hi", "instruction": "A", "output": "B"}, '"Hi"'),
        ({"text": " "}, '" "'),
        ({"chosen": [{"role": "user", "content": "A"}], "rejected": []}, "user: A"),
        ({"chosen": "A", "rejected": "B"}, '"A"'),
        ({"instruction": "A", "chosen": "B", "rejected": "C"}, "user: A · assistant: B"),
        ({"messages": [{"from": "human", "value": "A"}]}, "user: A"),
        ({"conversations": [{"role": "user", "content": "A"}]}, "user: A"),
        ({"messages": [{"role": "user", "content": ["A", {"text": "B"}]}]}, "user: AB"),
        ({"messages": [{"role": "user", "content": "A"}], "tools": []}, "user: A"),
        ({"messages": [{"role": "user", "content": "A"}], "tools": ""}, "user: A"),
        ({"messages": [{"role": "user", "content": "A"}], "tools": "["}, "skipped: tools is not valid JSON"),
        ({"messages": [{"role": "user", "content": "A"}], "tools": [3]}, "skipped: a tool is not an object"),
        ({"messages": [{"role": "user", "content": 3}]}, "skipped: a message's content is not text"),
        ({"messages": [{"content": "A"}]}, "skipped: a message has no role"),
        ({"messages": "A"}, "skipped: has no known form"),
        ({"prompt": "A", "completion": []}, "empty"),
        ({"prompt": "A", "completion": [{"role": "user", "content": "B"}]},
         "skipped: has a prompt and an answer of different types"),
        ({"instruction": "A", "output": "B", "input": 3}, "skipped: input is not a text"),
        ({"instruction": "A", "output": "B", "history": [["C"]]}, "skipped: history is not a list of pairs of texts"),
        ({"instruction": "A", "output": "B", "history": True}, "skipped: history is not a list of pairs of texts"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "skipped: function_call is not valid JSON"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "skipped: function_call names no function"),
        ({"conversations": [{"from": ["gpt"], "value": "A"}]}, "skipped: a turn has an unknown speaker"),
        ({"conversations": [{"from": "gpt"}]}, "skipped: a turn has no text"),
        ({"messages": [{"role": "user", "content": "A"}], "chat_template_kwargs": {"tokenize": True}},
         "skipped: chat_template_kwargs has an argument that is not the template's"),
        ({"messages": [{"role": "user", "content": "A"}], "chat_template_kwargs": [1]},
         "skipped: chat_template_kwargs is not an object"),
        ({}, "skipped: has no known form"),
    ],
)  # fmt: skip
def test_incomplete_and_mixed_records(fields: dict[str, Any], expected: str) -> None:
    assert shown(fields) == expected


def test_what_is_particular_to_a_record_can_be_printed() -> None:
    with pytest.raises(BadRecord) as bad:
        parse_record({"messages": [{"role": "user", "content": [{"type": "\ud83d"}]}]})
    assert str(bad.value).encode()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)
NAMES = st.sampled_from((
    "messages", "text", "conversations", "prompt", "completion", "chosen", "rejected", "instruction", "input", "output",
    "system", "history", "tools", "images", "chat_template_kwargs", "enable_thinking",
))  # fmt: skip
MESSAGES = st.lists(
    st.dictionaries(
        st.sampled_from(("role", "content", "from", "value", "tool_calls", "type", "name")),
        st.sampled_from(("user", "assistant", "gpt", "human", "function_call", "{}", "\ud83d")) | JSON,
        max_size=4,
    ),
    max_size=3,
)


@given(fields=st.dictionaries(NAMES, MESSAGES | JSON, max_size=5))
def test_any_json_is_a_text_a_conversation_or_a_bad_record(fields: dict[str, Any]) -> None:
    assert shown(fields)
