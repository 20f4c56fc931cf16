"""Tool calls are read as the parsers of vLLM for the two syntaxes read them."""

import json

import pytest

from qwen_pipeline.evaluation.behaviour.requests import TOOLS
from qwen_pipeline.evaluation.behaviour.tool_calls import ToolCall, as_text, fault_of_call, tool_calls

TIMER = ToolCall(name="set_timer", arguments={"minutes": 12, "label": "eggs"})
AS_JSON = '<tool_call>\n{"name": "set_timer", "arguments": {"minutes": 12, "label": "eggs"}}\n</tool_call>'
TAGGED = (
    "<tool_call>\n<function=set_timer>\n<parameter=minutes>\n12\n</parameter>\n<parameter=label>\neggs\n</parameter>\n"
    "</function>\n</tool_call>"
)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (AS_JSON, [TIMER]),
        (f"I set it.\n{AS_JSON}\n{AS_JSON}", [TIMER, TIMER]),
        (TAGGED, [as_text(TIMER)]),
        ("I cannot.", []),
        (AS_JSON.removesuffix("</tool_call>"), None),
        (AS_JSON.removeprefix("<tool_call>"), None),
        (AS_JSON.replace("}}", "}"), None),
        (AS_JSON.replace('"name"', '"nam"'), None),
        (AS_JSON.replace('{"minutes": 12, "label": "eggs"}', '"twelve"'), None),
        (TAGGED.replace("</function>", ""), None),
        (f"{AS_JSON}\n<tool_call>", None),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", None),
    ],
)
def test_whole_calls_are_read_and_broken_ones_are_none(text: str, calls: list[ToolCall] | None) -> None:
    assert tool_calls(text) == calls


def test_calls_that_no_offered_tool_takes_are_named() -> None:
    assert fault_of_call(TIMER, TOOLS) is None
    assert fault_of_call(ToolCall(name="timer", arguments={}), TOOLS) == "there is no tool 'timer'"
    assert fault_of_call(ToolCall(name="set_timer", arguments={"label": ""}), TOOLS) == "set_timer lacks minutes"
    more = ToolCall(name="set_timer", arguments={**TIMER.arguments, "hours": 1})
    assert fault_of_call(more, TOOLS) == "set_timer has no parameter 'hours'"
    assert str(as_text(TIMER)) == "set_timer(minutes='12', label='eggs')"
    assert json.loads(AS_JSON.split("\n")[1])["arguments"] == TIMER.arguments
