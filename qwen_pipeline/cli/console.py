"""The one place at which text becomes output of a terminal: names, texts and reports may hold whatever was uploaded."""

import json
import re
from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_UNSEEN = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
"""Characters that move the cursor, colour, hide or reorder other text, or cannot be written at all; not line feeds."""


def visible(text: str) -> str:
    r"""Return a text with an escape such as ``\x1b`` or ``\u202e`` in the place of each unseen character."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape", "backslashreplace").decode(), text)


def dump_visible(data: Any) -> str:
    """Return JSON in one line, readable and safe to print; its values are unchanged."""
    text = json.dumps(data, ensure_ascii=False)
    return _UNSEEN.sub(lambda found: json.dumps(found[0])[1:-1], text)


def size(nbytes: int) -> str:
    """Return a number of bytes in GB or MB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


class VisibleConsole(Console):
    """A console that shows text as it is: without Rich's markup, and with unseen characters as escapes."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(markup=False, emoji=False, **arguments)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)
