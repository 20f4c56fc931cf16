"""A picture of quantization groups over ranks, before and after padding: which groups two ranks would have to share."""

from math import ceil
from pathlib import Path

from matplotlib.figure import Figure

from qwen_pipeline.plotting import BETTER, INK, WORSE
from qwen_pipeline.qwen.geometry import PadPlan


def draw_ranks(plan: PadPlan, degree: int, path: Path) -> None:
    """Draw each planned size twice, as it is and padded: a box for each group, a line where a rank ends.

    Groups that straddle two ranks are orange. The suffix of ``path`` decides between PNG and SVG.
    """
    rows = [
        (f"{size.field} {width:,}\n{'padded' if n else 'as it is'}", width)
        for size in plan.sizes
        for n, width in enumerate((size.live, size.padded))
    ]
    figure = Figure(figsize=(9, 0.9 + 0.72 * len(rows)), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    for row, (_, width) in enumerate(rows):
        groups = [(start, min(plan.group_size, width - start)) for start in range(0, width, plan.group_size)]
        straddling = straddling_groups(width, plan.group_size, degree)
        for color, chosen in ((BETTER, False), (WORSE, True)):
            boxes = [box for number, box in enumerate(groups) if (number in straddling) is chosen]
            axes.broken_barh(boxes, (row - 0.32, 0.64), facecolors=color, edgecolors=INK, linewidth=0.25, alpha=0.8)
        ends = [width * rank / degree for rank in range(degree + 1)]
        axes.vlines(ends, row - 0.42, row + 0.42, colors=INK, linewidth=1.6)
        for rank in range(degree):
            held = width / plan.group_size / degree
            axes.text(
                width * (rank + 0.5) / degree, row - 0.36, f"{held:g}", ha="center", va="bottom", fontsize=7, color=INK
            )
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], color=INK, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"channels; groups of {plan.group_size} on each of {degree} ranks", color=INK, fontsize=8)
    axes.tick_params(colors=INK, labelsize=8)
    axes.spines[:].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


def straddling_groups(width: int, group_size: int, degree: int) -> set[int]:
    """Return the numbers of the groups that lie on more than one rank."""
    ends = (width * rank / degree for rank in range(1, degree))
    return {ceil(end / group_size) - 1 for end in ends if end % group_size}
