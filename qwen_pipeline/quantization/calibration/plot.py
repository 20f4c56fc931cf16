"""Plot of a calibration set: lengths of the records, and tokens of each expert."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from qwen_pipeline.plotting import INK, PALETTE, WORSE, add_axes, save_plot


def draw_calibration_plot(
    statistics: Mapping[str, Any], experts: Mapping[int, Sequence[int]], least: int, path: Path
) -> None:
    """Draw the histogram of record lengths and, for a mixture, the tokens of each expert by layer."""
    rows = 2 if experts else 1
    figure = Figure(figsize=(7.2, 2.6 * rows), layout="constrained")
    axes = add_axes(figure, rows, 1)
    bins = statistics["record_tokens_histogram"]
    axes.bar(range(len(bins)), [each["records"] for each in bins], width=0.85, color=PALETTE[0], alpha=0.85)
    axes.set_xticks(range(len(bins)), [f"≤ {each['up_to']:,}" for each in bins])
    axes.set_xlabel("tokens of a record", color=INK, fontsize=9)
    axes.set_ylabel("records", color=INK, fontsize=9)
    if experts:
        axes = add_axes(figure, rows, 2)
        for layer, tokens in experts.items():
            axes.plot(
                [layer] * len(tokens), tokens, linestyle="", marker="o", markersize=2.6, alpha=0.5, color=PALETTE[1]
            )
        axes.axhline(least, color=WORSE, linewidth=1, label=f"{least} tokens")
        axes.set_yscale("symlog")
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("layer", color=INK, fontsize=9)
        axes.set_ylabel("tokens of each expert", color=INK, fontsize=9)
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    save_plot(figure, path)
