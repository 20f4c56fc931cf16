"""Plots for the report: perplexity by stage, divergence of predictions and hidden states, and weight errors."""

from math import isfinite
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qwen_pipeline.evaluation.findings import PADDED, QUANTIZED, UNPADDED_QUANTIZED, Findings, origin_of
from qwen_pipeline.plotting import BETTER, INK, PALETTE, WORSE, add_axes, save_plot


def draw_perplexity(findings: Findings, path: Path) -> None:
    """Draw a waterfall chart: the first model's perplexity, then the change at each stage."""
    known = [(role, p) for role, model in findings.models.items() if (p := model.perplexity) and isfinite(p)]
    figure = Figure(figsize=(7.2, 0.8 + 0.46 * len(known)), layout="constrained")
    axes = add_axes(figure)
    rows, perplexities = {role: row for row, (role, _) in enumerate(known)}, dict(known)
    for row, (role, perplexity) in enumerate(known):
        origin = origin_of(role, findings.models)
        before = perplexities.get(origin or "", 0.0)
        change = f"  {perplexity / before - 1:+.2%}" if before else ""
        color = INK if not before else WORSE if perplexity > before else BETTER
        axes.barh(row, perplexity - before, left=before, height=0.62, color=color, alpha=0.85, label=role)
        axes.plot([perplexity] * 2, [row - 0.31, row + 0.31], color=INK, linewidth=1)
        if before:
            axes.plot([before] * 2, [rows[origin or ""] + 0.31, row + 0.31], color=INK, linewidth=1)
        axes.annotate(
            f"{perplexity:.3f}{change}", (max(perplexity, before), row), xytext=(6, 0), textcoords="offset points",
            va="center", color=INK, fontsize=9,
        )  # fmt: skip
    axes.set_yticks(range(len(known)), [role for role, _ in known])
    axes.invert_yaxis()
    axes.margins(x=0.22)
    axes.set_xlim(left=0)
    axes.set_xlabel("perplexity on held-out text (lower is better)", color=INK, fontsize=9)
    save_plot(figure, path)


def draw_distance(findings: Findings, path: Path) -> None:
    """Draw the divergence of predictions along the context, if there are any, and of hidden states after each layer."""
    panels = 2 if findings.task.kind == "language" else 1
    figure = Figure(figsize=(7.2, 2.6 * panels), layout="constrained")
    if panels == 2:
        _draw_stretches(findings, add_axes(figure, panels, 1))
    axes = add_axes(figure, panels, panels)
    for role, color in ((PADDED, BETTER), (QUANTIZED, PALETTE[0]), (UNPADDED_QUANTIZED, PALETTE[-1])):
        drift = findings.models[role].drift if role in findings.models else ()
        if any(drift):
            axes.plot(range(len(drift)), drift, label=role, color=color, linewidth=1.5, marker="o", markersize=2.6)
            axes.set_yscale("log")
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("after layer", color=INK, fontsize=9)
    axes.set_ylabel("‖h - h merged‖ / ‖h merged‖", color=INK, fontsize=9)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    save_plot(figure, path)


def _draw_stretches(findings: Findings, axes: Axes) -> None:
    divergence = findings.models[QUANTIZED].divergence
    stretches = divergence.stretches if divergence else ()
    positions = [stretch.first for stretch in stretches]
    for label, values, color, style in (
        ("95th percentile", [stretch.p95 for stretch in stretches], WORSE, "--"),
        ("mean", [stretch.mean for stretch in stretches], PALETTE[0], "-"),
        ("median", [stretch.median for stretch in stretches], INK, ":"),
    ):
        axes.plot(positions, values, label=label, color=color, linestyle=style, linewidth=1.5)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("position in the window", color=INK, fontsize=9)
    axes.set_ylabel("KL(merged ‖ quantized), nats", color=INK, fontsize=9)
    axes.legend(frameon=False, labelcolor=INK, fontsize=8)


def draw_quantization_error(findings: Findings, path: Path) -> None:
    """Draw the relative error of each weight by layer."""
    errors = findings.structure.errors
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    axes = add_axes(figure)
    kinds = list(dict.fromkeys(error.kind for error in errors))
    for kind, color in zip(kinds, PALETTE * (1 + len(kinds) // len(PALETTE)), strict=False):
        points = [(error.layer, error.relative) for error in errors if error.kind == kind]
        axes.plot(
            [layer for layer, _ in points], [value for _, value in points],
            label=kind.rpartition(".")[2], color=color, linewidth=1.3, marker="o", markersize=2.6,
        )  # fmt: skip
    axes.locator_params(axis="x", integer=True)
    axes.set_ylabel("‖W - Wq‖ / ‖W‖", color=INK, fontsize=9)
    axes.set_ylim(0, 1.08 * max((error.relative for error in errors), default=1))
    axes.set_xlabel("layer", color=INK, fontsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, labelcolor=INK, fontsize=8)
    save_plot(figure, path)
