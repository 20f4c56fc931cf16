"""A picture of quantization groups over ranks, before and after, for a terminal."""

from collections.abc import Sequence

from rich.text import Text

from qwen_pipeline.qwen.tensor_parallel.feasibility import Division

COLUMNS = 72
"""Of the bars; every rank gets the same number of them."""
WHOLE, CUT = "green", "bold dark_orange"
END, CUT_END = "\N{BOX DRAWINGS LIGHT VERTICAL}", "\N{BOX DRAWINGS LIGHT DIAGONAL CROSS}"


def rank_picture(rows: Sequence[tuple[str, Division]]) -> Text:
    """Draw two lines for each captioned division: its groups, and below them the ranks with the groups that they hold.

    Neighbouring groups have different shades where there is room for it. A group that two ranks would have to share is
    orange, and so is the end of the rank that cuts it.
    """
    picture = Text()
    for caption, division in rows:
        columns = division.ranks * max(COLUMNS // division.ranks, 2)
        title = f"{division.kind}: {division.inputs:,} inputs in groups of {division.group_size}, {caption}\n"
        picture.append(title, style="bold")
        picture.append_text(group_line(division, columns)).append_text(rank_line(division, columns))
    return picture


def group_line(division: Division, columns: int) -> Text:
    line, straddling, groups = Text(" "), division.straddling, len(division.groups())
    for column in range(columns):
        first = column * division.inputs // columns // division.group_size
        last = ((column + 1) * division.inputs - 1) // columns // division.group_size
        cut = any(number in straddling for number in range(first, last + 1))
        shade = "▓" if groups * 2 <= columns and first % 2 else "█"
        line.append(shade, style=CUT if cut else WHOLE)
    return line.append("\n")


def rank_line(division: Division, columns: int) -> Text:
    width = columns // division.ranks
    held = f"{division.groups_per_rank:g}"
    line = Text(END, style=WHOLE)
    for cut in [*division.is_cut, False]:
        line.append(held.center(width - 1) if len(held) < width else " " * (width - 1), style="dim")
        line.append(CUT_END if cut else END, style=CUT if cut else WHOLE)
    return line.append("\n")
