"""Plots of a quantization by layer: losses compared with an earlier version, zero and saturated groups, seconds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qwen_pipeline.checkpoint.manifest import find_manifest
from qwen_pipeline.plotting import BETTER, INK, PALETTE, WORSE, add_axes, save_plot
from qwen_pipeline.quantization.evidence import (
    EVIDENCE,
    STEP_ERRORS,
    ModuleEvidence,
    compare_evidence,
    load_evidence,
    to_frame,
)

_STEPS = dict(
    zip(
        STEP_ERRORS,
        (("GPTQ", WORSE, "--"), ("corrected targets", INK, ":"), ("searched scales", PALETTE[0], "-")),
        strict=True,
    )
)
"""Error after a step -> label, colour and style of its line."""


def draw_losses(quantized: Path, before: Sequence[ModuleEvidence], path: Path) -> str | None:
    """Draw the evidence of a quantized checkpoint without times; return a caption, or None if it has no losses.

    Args:
        quantized: The checkpoint.
        before: The evidence of an earlier version to compare with.
        path: The picture to write. The same losses give the same bytes.
    """
    if not (quantized / EVIDENCE).is_file():
        return None
    now = load_evidence(quantized)
    if all(row.loss is None for row in now):
        return None
    draw_evidence(now, path, before=before, seconds=False)
    compared = compare_evidence(before, now).sentence("the version before") if before else "No version before is known."
    return f"Loss of the solver, and zero and saturated groups, by layer. {compared}"


def draw_evidence(
    rows: Sequence[ModuleEvidence], path: Path, *, before: Sequence[ModuleEvidence] = (), seconds: bool = True
) -> None:
    """Draw the rows by layer. The experts of a layer are one point, their median; losses of ``before`` are dashed."""
    now, earlier = (to_frame(each).assign(line=lambda frame: frame["kind"].map(_line_of)) for each in (rows, before))
    panels = 3 if seconds else 2
    figure = Figure(figsize=(7.2, 2.2 * panels), layout="constrained")
    axes = add_axes(figure, panels, 1)
    lines = list(dict.fromkeys(now["line"]))
    for line, color in zip(lines, PALETTE * (1 + len(lines) // len(PALETTE)), strict=False):
        _draw(axes, _by_layer(now[now["line"] == line], "loss", "median"), color, label=line)
        _draw(axes, _by_layer(earlier[earlier["line"] == line], "loss", "median"), color, linestyle="--")
    if now["loss"].fillna(0).any():
        axes.set_yscale("log")
    axes.set_ylabel("loss (dashed: before)" if before else "loss", color=INK, fontsize=9)

    axes = add_axes(figure, panels, 2)
    for name, color in (("saturated", WORSE), ("zero", PALETTE[0])):
        share = (100 * now[f"{name}_groups"] / now["groups"]).astype("float64")
        _draw(axes, _by_layer(now.assign(share=share), "share", "mean"), color, label=name)
    axes.set_ylabel("% of groups", color=INK, fontsize=9)
    axes.legend(frameon=False, labelcolor=INK, fontsize=8)

    if seconds:
        axes = add_axes(figure, panels, 3)
        _draw(axes, _by_layer(now, "seconds", "sum"), PALETTE[2])
        axes.set_ylabel("solver's seconds", color=INK, fontsize=9)
        axes.set_ylim(bottom=0)
    axes.set_xlabel("layer", color=INK, fontsize=9)
    _add_legend(figure, figure.axes[0])
    save_plot(figure, path)


def draw_steps(quantized: Path, path: Path) -> str | None:
    """Draw what the steps of a recipe gained in each kind of module and each layer, beside GPTQ alone.

    Args:
        quantized: A quantized checkpoint.
        path: The picture to write. The same errors give the same bytes.

    Returns:
        A caption; None if the checkpoint's recipe has no steps, or an earlier version measured none.
    """
    manifest = find_manifest(quantized)
    if manifest is None or not (quantized / EVIDENCE).is_file():
        return None
    modules = to_frame(load_evidence(quantized)).dropna(subset=list(STEP_ERRORS))
    if modules.empty:
        return None
    modules = modules.assign(line=modules["kind"].map(_line_of))
    layers = pd.DataFrame([layer.get("errors", {}) for layer in manifest.result["layers"]])
    learned = layers.reindex(columns=["before_learning", "output"]).dropna()
    _draw_steps(modules, learned, path)
    corrected, searched = (_mean_share(modules, each, "gptq_error") for each in ("corrected_error", "searched_error"))
    caption = (
        "Error that codes add to the outputs of linear layers, as a share of their squares, by layer. Of GPTQ's alone"
        f" {corrected} is left with corrected targets, and {searched} with searched scales too (geometric means)."
    )
    if learned.empty:
        return caption
    left = _mean_share(learned, "output", "before_learning")
    return f"{caption} Learned rounding leaves {left} of the error of a layer's outputs."


def _draw_steps(modules: pd.DataFrame, learned: pd.DataFrame, path: Path) -> None:
    kinds = list(dict.fromkeys(modules["line"]))
    rows = -(-(len(kinds) + (not learned.empty)) // 2)
    figure = Figure(figsize=(7.2, 0.6 + 1.8 * rows), layout="constrained")
    for number, kind in enumerate(kinds, start=1):
        axes, of_kind = add_axes(figure, rows, number, columns=2), modules[modules["line"] == kind]
        for column, (label, color, style) in _STEPS.items():
            _draw(axes, _by_layer(of_kind, column, "median"), color, label=label, linestyle=style)
        axes.set_yscale("log")
        axes.set_title(kind, color=INK, fontsize=9)
    _add_legend(figure, figure.axes[0])
    if not learned.empty:
        axes = add_axes(figure, rows, len(kinds) + 1, columns=2)
        _draw(axes, learned["before_learning"], PALETTE[0], label="before learning")
        _draw(axes, learned["output"], BETTER, label="after")
        axes.set_yscale("log")
        axes.set_title("outputs of the layer", color=INK, fontsize=9)
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    save_plot(figure, path)


def _mean_share(frame: pd.DataFrame, now: str, before: str) -> str:
    """Return the geometric mean of two columns' ratio, over rows where both are positive."""
    positive = frame[(frame[now] > 0) & (frame[before] > 0)]
    return f"{float(np.exp(np.log(positive[now] / positive[before]).mean())):.3f}"


def _add_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, labelcolor=INK, fontsize=8)


def _by_layer(frame: pd.DataFrame, column: str, aggregate: Literal["median", "mean", "sum"]) -> "pd.Series[float]":
    return frame.dropna(subset=[column]).groupby("layer", sort=False)[column].agg(aggregate)


def _draw(
    axes: Axes, points: "pd.Series[float]", color: str, *, label: str | None = None, linestyle: str = "-"
) -> None:
    axes.plot(
        points.index.tolist(), points.tolist(),
        color=color, label=label, linestyle=linestyle, linewidth=1.3, marker="o", markersize=2.6,
    )  # fmt: skip
    axes.locator_params(axis="x", integer=True)


def _line_of(kind: str) -> str:
    """Return the label of a module's line; all experts of a layer share one."""
    first, _, last = kind.rpartition(".")
    return f"expert {last}" if ".experts." in f".{first}." else last
