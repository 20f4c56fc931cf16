"""The requests: few and short, the same for every model."""

from collections.abc import Mapping, Sequence
from typing import Any


def _tool(name: str, description: str, **properties: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS: Sequence[Mapping[str, Any]] = (
    _tool("get_weather", "Get the weather of a city.", city={"type": "string"}, day={"type": "string"}),
    _tool("set_timer", "Set a timer.", minutes={"type": "integer"}, label={"type": "string"}),
)
CALLS = (
    "What is the weather in Paris tomorrow? Use a tool.",
    "Set a timer of 12 minutes with the label eggs. Use a tool.",
)
EXAMPLE_CALL = ("set_timer", {"minutes": 7, "label": "two words"})
"""A call that a template is asked to write, to find out the form in which it writes calls."""
THOUGHTS = ("What is 17 times 3?",)
JSON_KEYS = ("name", "age", "city")
OBJECTS = (
    "Ada is 36 years old and lives in London. Answer with nothing but a JSON object with the keys name, age and city.",
)
NEEDLE, NEEDLE_CODE = "The code of the archive is {code}.", "48213"
NEEDLE_QUESTION = "What is the code of the archive? Answer with the code alone."
NEEDLE_TOKENS = 24
"""Maximum number of tokens of an answer with a needle."""
