"""A quantization by layer: the solver's losses, beside those of the version before; odd groups; seconds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qwen_pipeline.plotting import INK, PALETTE, WORSE, quiet_axes, save_plot
from qwen_pipeline.quantization.evidence import EVIDENCE, Evidence, compare_evidence, load_evidence


def draw_losses(quantized: Path, before: Sequence[Evidence], path: Path) -> str | None:
    """Draw what quantizing left in a checkpoint's logs, times left out; return a caption, or None if it left nothing.

    Args:
        quantized: The checkpoint.
        before: The table of the version before it, to compare with.
        path: Where the picture goes. The same losses give the same bytes.
    """
    if not (quantized / EVIDENCE).is_file():
        return None
    now = load_evidence(quantized)
    draw_evidence(now, path, before=before, seconds=False)
    compared = compare_evidence(before, now).sentence("the version before") if before else "No version before is known."
    return f"Loss of the solver and odd groups, by layer. {compared}"


def draw_evidence(
    rows: Sequence[Evidence], path: Path, *, before: Sequence[Evidence] = (), seconds: bool = True
) -> None:
    """Draw the table. Experts of a layer are one point, their median; what was ``before`` is dashed."""
    parts = 3 if seconds else 2
    figure = Figure(figsize=(7.2, 2.2 * parts), layout="constrained")
    axes = quiet_axes(figure, parts, 1)
    kinds = list(dict.fromkeys(map(_family, rows)))
    for kind, color in zip(kinds, PALETTE * (1 + len(kinds) // len(PALETTE)), strict=False):
        own = [row for row in rows if _family(row) == kind]
        old = [row for row in before if _family(row) == kind]
        _line(axes, own, lambda row: row.loss, median, color=color, label=kind)
        _line(axes, old, lambda row: row.loss, median, color=color, linestyle="--")
    if any(row.loss for row in rows):
        axes.set_yscale("log")
    axes.set_ylabel("loss (dashed: before)" if before else "loss", color=INK, fontsize=9)

    axes = quiet_axes(figure, parts, 2)
    _line(axes, rows, lambda row: 100 * row.saturated_groups / row.groups, _mean, color=WORSE, label="saturated")
    _line(axes, rows, lambda row: 100 * row.zero_groups / row.groups, _mean, color=PALETTE[0], label="zero")
    axes.set_ylabel("% of groups", color=INK, fontsize=9)
    axes.legend(frameon=False, labelcolor=INK, fontsize=8)

    if seconds:
        axes = quiet_axes(figure, parts, 3)
        _line(axes, rows, lambda row: row.seconds, sum, color=PALETTE[2])
        axes.set_ylabel("solver's seconds", color=INK, fontsize=9)
        axes.set_ylim(bottom=0)
    axes.set_xlabel("layer", color=INK, fontsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, labelcolor=INK, fontsize=8)
    save_plot(figure, path)


def _line(
    axes: Axes,
    rows: Sequence[Evidence],
    of: Callable[[Evidence], float | None],
    together: Callable[[Sequence[float]], float],
    *,
    color: str,
    label: str | None = None,
    linestyle: str = "-",
) -> None:
    by_layer: dict[int, list[float]] = {}
    for row in rows:
        if (value := of(row)) is not None:
            by_layer.setdefault(row.layer, []).append(value)
    points = {layer: together(values) for layer, values in by_layer.items()}
    axes.plot(
        list(points), list(points.values()),
        color=color, label=label, linestyle=linestyle, linewidth=1.3, marker="o", markersize=2.6,
    )  # fmt: skip
    axes.locator_params(axis="x", integer=True)


def _family(row: Evidence) -> str:
    """Experts share a line."""
    first, _, last = row.kind.rpartition(".")
    return f"expert {last}" if ".experts." in f".{first}." else last


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
