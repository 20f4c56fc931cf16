"""A plot of an allocation: the curve of size against divergence, the uniform candidates, and the choice."""

from pathlib import Path

from matplotlib.figure import Figure

from qwen_pipeline.evaluation.allocation.allocate import Allocation
from qwen_pipeline.plotting import BETTER, INK, PALETTE, WORSE, add_axes, save_plot


def draw_curve(allocation: Allocation, path: Path) -> None:
    """Draw the curve; the same allocation gives the same bytes."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = add_axes(figure)
    points = [(_gigabytes(allocation, point.nbytes), allocation.predict(point)) for point in allocation.curve]
    sizes, divergences = zip(*[point for point in points if point[1] > 0], strict=True)
    axes.plot(sizes, divergences, color=PALETTE[0], label="best choice, predicted")
    for each in allocation.uniform:
        place = (_gigabytes(allocation, each.nbytes), each.kl)
        axes.plot(*([value] for value in place), "o", color=WORSE)
        axes.annotate(each.word, place, color=INK, fontsize=8, xytext=(5, 5), textcoords="offset points")
    axes.plot([], [], "o", color=WORSE, label="uniform, measured")
    if allocation.measured > 0:
        axes.plot(
            [_gigabytes(allocation, allocation.chosen.nbytes)],
            [allocation.measured],
            "D",
            color=BETTER,
            label="the choice, measured",
        )
    axes.set_yscale("log")
    axes.set_xlabel("GB of all tensors", color=INK, fontsize=9)
    axes.set_ylabel("KL, nats per token", color=INK, fontsize=9)
    axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    save_plot(figure, path)


def _gigabytes(allocation: Allocation, nbytes: int) -> float:
    return (nbytes + allocation.other_bytes) / 1e9
