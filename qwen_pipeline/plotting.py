"""The style of all plots: no background, and a middle grey that is readable on light and dark pages.

The same input gives the same bytes.
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#7d8590"
BETTER, WORSE = "#2da44e", "#d9822b"
PALETTE = ("#3b82c4", "#4fb3bf", "#52a675", "#b5a136", "#d9822b", "#c9503c", "#a05ab8")
"""One colour for each kind of layer: cool for attention, warm for MLPs, of about equal lightness."""


def add_axes(figure: Figure, rows: int = 1, number: int = 1, *, columns: int = 1) -> Axes:
    """Add the ``number``-th of ``rows`` times ``columns`` axes, row by row from the top, in the common style."""
    axes = figure.add_subplot(rows, columns, number)
    axes.patch.set_alpha(0)
    axes.tick_params(which="both", colors=INK, labelsize=8)
    axes.grid(visible=True, color=INK, alpha=0.18, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    return axes


def save_plot(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130, transparent=True, metadata={"Software": None})
