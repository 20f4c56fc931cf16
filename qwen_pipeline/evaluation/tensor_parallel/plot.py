"""A plot of quantization groups over ranks, before and after padding."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from qwen_pipeline.plotting import BETTER, INK, WORSE
from qwen_pipeline.qwen.tensor_parallel.feasibility import Division


def draw_ranks(rows: Sequence[tuple[str, Division]], path: Path) -> None:
    """Draw each captioned division: a box for each group, a line at the end of each rank.

    Groups that straddle two ranks are orange. The suffix of ``path`` selects PNG or SVG.
    """
    figure = Figure(figsize=(9, 0.9 + 0.72 * len(rows)), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    for row, (_, division) in enumerate(rows):
        scale, straddling = 1 / division.inputs, division.straddling
        for color, chosen in ((BETTER, False), (WORSE, True)):
            boxes = [
                (start * scale, length * scale)
                for number, (start, length) in enumerate(division.groups())
                if (number in straddling) is chosen
            ]
            axes.broken_barh(boxes, (row - 0.32, 0.64), facecolors=color, edgecolors=INK, linewidth=0.25, alpha=0.8)
        ends = [rank / division.ranks for rank in range(division.ranks + 1)]
        axes.vlines(ends, row - 0.42, row + 0.42, colors=INK, linewidth=1.6)
        for middle in ((rank + 0.5) / division.ranks for rank in range(division.ranks)):
            held = f"{division.groups_per_rank:g}"
            axes.text(middle, row - 0.36, held, ha="center", va="bottom", fontsize=7, color=INK)
    labels = [f"{division.kind} {division.inputs:,}\n{caption}" for caption, division in rows]
    axes.set_yticks(range(len(rows)), labels, color=INK, fontsize=8)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.set_xlabel("inputs; above them the quantization groups on each rank", color=INK, fontsize=8)
    axes.tick_params(colors=INK, labelsize=8)
    axes.spines[:].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
