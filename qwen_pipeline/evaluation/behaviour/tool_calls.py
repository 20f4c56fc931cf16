"""Tool calls in an answer, in the two ways in which Qwen's chat templates write them.

Qwen2.5, Qwen3 and others write JSON, as the parser ``hermes`` of vLLM reads it; Qwen3-Coder and Qwen3.5 write a tag for
each parameter (``qwen3_coder``, ``qwen3_xml``). A call that is not closed does not count, as for those parsers.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

_BLOCK = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_MARKS = ("<tool_call>", "</tool_call>", "<function=")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a tool; arguments are compared as JSON, or as text where the template writes them as text."""

    name: str
    arguments: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"


def tool_calls(text: str) -> list[ToolCall] | None:
    """Return the calls in an answer; None if something in it looks like a call and is not one that engines read."""
    blocks = _BLOCK.findall(text)
    calls = [_call(block) for block in blocks]
    if any(mark in _BLOCK.sub("", text) for mark in _MARKS) or None in calls:
        return None
    return [call for call in calls if call]


def fault_of_call(call: ToolCall, tools: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the way in which a call does not fit the tools that were offered, or None."""
    offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    if call.name not in offered:
        return f"there is no tool {call.name!r}"
    known, required = offered[call.name]["properties"].keys(), offered[call.name]["required"]
    if missing := [name for name in required if name not in call.arguments]:
        return f"{call.name} lacks {missing[0]}"
    if unknown := [name for name in call.arguments if name not in known]:
        return f"{call.name} has no parameter {unknown[0]!r}"
    return None


def as_text(call: ToolCall) -> ToolCall:
    """Return a call whose arguments are text, as templates with a tag for each parameter write them."""
    arguments = {name: value if isinstance(value, str) else json.dumps(value) for name, value in call.arguments.items()}
    return ToolCall(name=call.name, arguments=arguments)


def _call(block: str) -> ToolCall | None:
    if tagged := _FUNCTION.fullmatch(block):
        return ToolCall(name=tagged[1].strip(), arguments=dict(_PARAMETER.findall(tagged[2])))
    try:
        value: Any = json.loads(block)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    fields = cast("dict[str, Any]", value)
    name, arguments = fields.get("name"), fields.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ToolCall(name=name, arguments=cast("dict[str, Any]", arguments))
