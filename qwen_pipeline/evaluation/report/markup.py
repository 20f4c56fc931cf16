"""The one place at which text becomes Markdown: names, answers and reports may hold whatever was uploaded."""

import re
from collections.abc import Iterable, Sequence

_LINK = re.compile(r"\](?=[(\[:])")
"""The end of a text that a link, an image or the definition of a reference would follow."""
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def text(value: str) -> str:
    """Return a text that loads, hides and runs nothing: tags, links and images become visible text in one paragraph.

    Emphasis is left to the text. Control characters and halves of surrogate pairs are replaced.
    """
    shown = _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", value)
    return _TAG.sub("&lt;", _LINK.sub(r"\\]", shown)).replace("\n", " ")


def code(value: str) -> str:
    """Return a name as code; it cannot end the code."""
    return f"`{_UNSEEN.sub(chr(0xFFFD), value).replace('`', chr(39)).replace(chr(10), ' ')}`"


def lines(value: str) -> str:
    """Return a text of several lines for a cell of a table."""
    return "<br>".join(map(text, value.split("\n")))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown already, such as :func:`text` returns."""
    found = [header, ["---"] * len(header), *rows]
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in found)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
